"""What is trained: an adapter turns a loaded model into one whose trainable tensors are exactly those of the method."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qwenvl_lit.models.components import network_of
from qwenvl_lit.types import DataError

PEFT_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
)  # the weights of peft's folders, the better one first


class Adapter(Protocol):
    """How a model is fine-tuned."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the base is held, as settings of transformers' `BitsAndBytesConfig`; None: in the precision of the model."""
        ...

    def apply(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        """The model to train. `components` names the family's modules: "vision", "language", ... -> path.

        Raises:
            ValueError: a part or a target that does not exist.
        """
        ...

    def merge(self, model: nn.Module) -> nn.Module:
        """The model that `apply` returned, as one of the original class with everything learned folded in."""
        ...


class Full:
    """Train every tensor but those of the frozen parts, and those that the network itself never trains.

    Args:
        freeze: names of parts ("vision", "resampler", "language", "embeddings", "head"), or "all". A part inside a frozen one stays
            trainable if `train` names it: `freeze=["vision"], train=["resampler"]` is the recipe of the official full fine-tuning.
    """

    quantization = None

    def __init__(self, freeze: Sequence[str] = (), train: Sequence[str] = ()):
        self.freeze = tuple(freeze)
        self.train = tuple(train)

    def apply(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        components = {**components, "all": ""}
        unknown = sorted({*self.freeze, *self.train} - set(components))
        if unknown:
            raise ValueError(
                f"the model has no part {', '.join(unknown)}; its parts are {', '.join(components)}"
            )
        learns = {
            name for name, tensor in model.named_parameters() if tensor.requires_grad
        }  # not the fixed position tables
        for name in self.freeze:
            model.get_submodule(components[name]).requires_grad_(False)
        for name in self.train:
            prefix = components[name]
            for inner, tensor in model.get_submodule(prefix).named_parameters(prefix):
                tensor.requires_grad_(inner in learns)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model


class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on linear layers, through peft; the base is frozen, the adapters are float32.

    Args:
        rank, alpha, dropout: of every adapter; its output is scaled by `alpha / rank`.
        targets: a regular expression for whole module paths, a list of their ends, or "all-linear" for every linear layer but the head.
        options: further settings of peft's `LoraConfig`, as `use_dora` or `use_rslora`.
        quantization: settings of transformers' `BitsAndBytesConfig` for the base; None: it is held as it is loaded.
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        options: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
    ):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"adapter.rank is a whole number, 1 or more, got {rank!r}")
        for name, value in (("alpha", alpha), ("dropout", dropout)):
            if not isinstance(value, int | float) or value < 0:
                raise ValueError(f"adapter.{name} is a number, 0 or more, got {value!r}")
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets if isinstance(targets, str) else list(targets)
        try:
            re.compile(self.targets if isinstance(self.targets, str) else "")
        except re.error as fault:
            raise ValueError(
                f"adapter.targets={targets!r} is no regular expression: {fault}"
            ) from None
        self.options = dict(options or {})
        self.quantization = dict(quantization) if quantization else None

    def apply(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        matched = {name: module for name, module in model.named_modules() if self._is_target(name)}
        if isinstance(self.targets, list) and (
            idle := [end for end in self.targets if not any(_ends(name, end) for name in matched)]
        ):
            raise ValueError(f"adapter.targets names {', '.join(idle)}, which no module ends in")
        if not matched and self.targets != "all-linear":
            linear = sorted(
                {
                    re.sub(r"\d+", "N", name)
                    for name, module in model.named_modules()
                    if isinstance(module, nn.Linear)
                }
            )
            raise ValueError(
                f"adapter.targets={self.targets!r} matches no module; linear layers are {', '.join(linear)}"
            )
        if other := [
            name
            for name, module in matched.items()
            if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
        ]:
            raise ValueError(
                f"adapter.targets={self.targets!r} matches {other[0]}, which is no linear layer"
            )
        if unknown := sorted(set(self.options) - set(LoraConfig.__dataclass_fields__)):
            raise ValueError(
                f"adapter.options has {', '.join(unknown)}, which peft's LoraConfig does not know"
            )
        sizes = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
        }
        return get_peft_model(model, LoraConfig(**sizes, **self.options))

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()

    def _is_target(self, name: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(_ends(name, end) for end in self.targets)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


class StartingCheckpoint:
    """What an earlier run learned: folded into the weights before another adapter is applied to them.

    Args:
        checkpoint: of that run.
        sha256: `fingerprint` of the checkpoint when the later run began; None: whatever it is now.
        adapter: what that run trained.
        init: the run that it had started from in its turn.
    """

    def __init__(
        self,
        *,
        checkpoint: str,
        sha256: str | None,
        adapter: Adapter,
        init: StartingCheckpoint | None = None,
    ):
        self.checkpoint = Path(checkpoint)
        self.sha256 = sha256
        self.adapter = adapter
        self.init = init or None

    def merge_into(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        """The model with everything learned in it, of the original class, with the same tensors open to training as before.

        Raises:
            DataError: the checkpoint is not there, is not the one that it was, or is not this model's.
        """
        if self.init:
            model = self.init.merge_into(model, components)
        self.check()
        learns = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
        adapted = self.adapter.apply(model, components)
        load_trained_state(adapted, self.checkpoint)
        merged = self.adapter.merge(adapted)
        for name, tensor in merged.named_parameters():
            tensor.requires_grad_(learns[name])
        return merged

    def check(self) -> None:
        """Raises a DataError unless the checkpoint is the one that it was."""
        if not self.checkpoint.exists():
            raise DataError(
                f"{self.checkpoint} is not there, and the run started from it: put it back, or say where it is with init.checkpoint=PATH"
            )
        if self.sha256 is not None and fingerprint(self.checkpoint) != self.sha256:
            raise DataError(
                f"{self.checkpoint} is not the checkpoint that the run started from: its content has changed (sha256)"
            )


class MergedWeights:
    """The weights of a network with what was learned folded in, one after the other: no more than a layer is in memory at once.

    Args:
        read: a tensor of the weights before, by its name in the network.
        outline: the network on the meta device.
        checkpoint: whose tensors are folded in; a run's, or peft's file.
        dtype: in which layers with adapters are summed; None: that of the weights before, as `Adapter.merge` does it.

    Raises:
        DataError: the checkpoint is not this model's.
    """

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        *,
        outline: nn.Module,
        components: Mapping[str, str],
        adapter: Adapter,
        checkpoint: Path,
        dtype: torch.dtype | None = None,
    ):
        self.read = read
        self.dtype = dtype
        adapted = adapter.apply(outline, components)
        load_trained_state(adapted, checkpoint, assign=True)
        self.network = network_of(adapted)
        self._merged: tuple[str, dict[str, torch.Tensor]] = (
            "",
            {},
        )  # of the last layer with an adapter: its weight and its bias

    def __call__(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        module = self.network.get_submodule(path)
        if hasattr(module, "modules_to_save"):  # peft's word for layers that are trained whole
            return module.modules_to_save["default"].get_parameter(leaf)
        if not hasattr(module, "base_layer"):
            own = getattr(module, leaf)
            return self.read(name) if own.is_meta else own.detach()
        if self._merged[0] != path:
            self._merged = (path, self._merge(path, module))
        return self._merged[1][leaf]

    def _merge(self, path: str, layer: nn.Module) -> dict[str, torch.Tensor]:
        inner = layer.base_layer
        before = dict(inner.named_parameters())
        for leaf, own in before.items():
            tensor = (
                self.read(f"{path}.{leaf}") if own.is_meta else own.detach()
            )  # biases may be trained beside the adapter
            setattr(
                inner,
                leaf,
                nn.Parameter(tensor.to(self.dtype or tensor.dtype, copy=True), requires_grad=False),
            )
        layer.merge()
        layer.merged_adapters.clear()
        merged = {leaf: tensor.detach() for leaf, tensor in inner.named_parameters()}
        for leaf, own in before.items():
            setattr(inner, leaf, own)
        return merged


def fingerprint(checkpoint: Path) -> str:
    """sha256 of a checkpoint's content."""
    with checkpoint.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_trained_state(adapted: nn.Module, checkpoint: Path, *, assign: bool = False) -> None:
    """Put the trained tensors of a checkpoint into a model that `Adapter.apply` returned; `assign` puts them in place of its own.

    Raises:
        DataError: they are not those that this model trains.
    """
    trained = {name for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    tensors = read_trained_state(checkpoint, adapted)
    if set(tensors) != trained:
        names = sorted(set(tensors) ^ trained)
        raise DataError(
            f"{checkpoint} is of another model or adapter: they differ in {len(names)} tensors ({names[0]}, ...)"
        )
    try:
        adapted.load_state_dict(tensors, strict=False, assign=assign)
    except RuntimeError as error:  # tensors of other shapes
        raise DataError(f"{checkpoint} is of another model or adapter: {error}") from error


def read_trained_state(checkpoint: Path, adapted: nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint, or of peft's file in an adapter folder, by their names in `adapted`, what `Adapter.apply` gave.

    Raises:
        DataError: peft's file cannot be read, or has a tensor that this model does not.
    """
    if checkpoint.name not in PEFT_FILES:
        tensors = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)[
            "state_dict"
        ]
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors, inside = read_peft_file(checkpoint), peft_names(adapted)
    if unknown := sorted(set(tensors) - set(inside)):
        raise DataError(
            f"{checkpoint} has {len(unknown)} tensors for which this model has no place ({', '.join(unknown[:3])}, ...): "
            f"is it the base that the adapter was made for?"
        )
    return {inside[name]: tensor for name, tensor in tensors.items()}


def read_peft_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors that peft wrote, by their names there.

    Raises:
        DataError: the file is incomplete, or not what its name says.
    """
    try:
        safe = file.suffix == ".safetensors"
        tensors = (
            load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        raise DataError(f"{file} cannot be read: {error}; is it complete?") from error
    return {
        name.replace(".default.", "."): tensor for name, tensor in tensors.items()
    }  # scripts of their own keep the adapter's name


def peft_names(adapted: nn.Module) -> dict[str, str]:
    """The names that peft's files have for the tensors of a `PeftModel`, and those that they have in it; none for other models."""
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(adapted, PeftModel):
        return {}
    state = adapted.state_dict()
    inside = {id(tensor): name for name, tensor in state.items()}
    written = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    return {name: inside[id(tensor)] for name, tensor in written.items()}
