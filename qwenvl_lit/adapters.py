"""What is trained: an adapter turns a loaded model into one whose trainable tensors are exactly those of the method."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qwenvl_lit.types import DataError


class Adapter(Protocol):
    """How a model is fine-tuned."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the base is held, as settings of transformers' `BitsAndBytesConfig`; None: in the precision of the model."""
        ...

    def apply(self, model: nn.Module, parts: Mapping[str, str]) -> nn.Module:
        """The model to train. `parts` names the family's modules: "vision", "language", ... -> path.

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

    def apply(self, model: nn.Module, parts: Mapping[str, str]) -> nn.Module:
        parts = {**parts, "all": ""}
        unknown = sorted({*self.freeze, *self.train} - set(parts))
        if unknown:
            raise ValueError(f"the model has no part {', '.join(unknown)}; its parts are {', '.join(parts)}")
        learns = {name for name, tensor in model.named_parameters() if tensor.requires_grad}  # not the fixed position tables
        for name in self.freeze:
            model.get_submodule(parts[name]).requires_grad_(False)
        for name in self.train:
            prefix = parts[name]
            for inner, tensor in model.get_submodule(prefix).named_parameters(prefix):
                tensor.requires_grad_(inner in learns)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model


class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on linear layers, through peft; the base is frozen, the adapters are float32.

    Args:
        rank, alpha, dropout: of every adapter; its output is scaled by `alpha / rank`.
        targets: a regular expression for whole module paths, or "all-linear" for every linear layer but the head.
        options: further settings of peft's `LoraConfig`, as `use_dora` or `use_rslora`.
        quantization: settings of transformers' `BitsAndBytesConfig` for the base; None: it is held as it is loaded.
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str,
        options: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
    ):
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.options = dict(options or {})
        self.quantization = dict(quantization) if quantization else None

    def apply(self, model: nn.Module, parts: Mapping[str, str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        if self.targets != "all-linear" and not any(re.fullmatch(self.targets, name) for name, _ in model.named_modules()):
            linear = sorted({re.sub(r"\d+", "N", name) for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise ValueError(f"adapter.targets={self.targets!r} matches no module; linear layers are {', '.join(linear)}")
        if unknown := sorted(set(self.options) - set(LoraConfig.__dataclass_fields__)):
            raise ValueError(f"adapter.options has {', '.join(unknown)}, which peft's LoraConfig does not know")
        sizes = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": self.targets}
        return get_peft_model(model, LoraConfig(**sizes, **self.options))

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()


class Learned:
    """What an earlier run learned: folded into the weights before another adapter is applied to them.

    Args:
        checkpoint: of that run.
        sha256: `fingerprint` of the checkpoint when the later run began.
        adapter: what that run trained.
        base: the run that it had started from in its turn.
    """

    def __init__(self, *, checkpoint: str, sha256: str, adapter: Adapter, base: Learned | None = None):
        self.checkpoint = Path(checkpoint)
        self.sha256 = sha256
        self.adapter = adapter
        self.base = base or None

    def fold_into(self, model: nn.Module, parts: Mapping[str, str]) -> nn.Module:
        """The model with everything learned in it, of the original class, with the same tensors open to training as before.

        Raises:
            DataError: the checkpoint is not there, is not the one that it was, or is not this model's.
        """
        if self.base:
            model = self.base.fold_into(model, parts)
        self.check()
        learns = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
        adapted = self.adapter.apply(model, parts)
        trained = {name for name, tensor in adapted.named_parameters() if tensor.requires_grad}
        tensors = read_learned(self.checkpoint)
        if set(tensors) != trained:
            names = sorted(set(tensors) ^ trained)
            raise DataError(f"{self.checkpoint} is of another model or adapter: they differ in {len(names)} tensors ({names[0]}, ...)")
        try:
            adapted.load_state_dict(tensors, strict=False)
        except RuntimeError as error:  # tensors of other shapes
            raise DataError(f"{self.checkpoint} is of another model or adapter: {error}") from error
        merged = self.adapter.merge(adapted)
        for name, tensor in merged.named_parameters():
            tensor.requires_grad_(learns[name])
        return merged

    def check(self) -> None:
        """Raises a DataError unless the checkpoint is the one that it was."""
        if not self.checkpoint.exists():
            raise DataError(
                f"{self.checkpoint} is not there, and the run started from it: put it back, or say where it is with base.checkpoint=PATH"
            )
        if fingerprint(self.checkpoint) != self.sha256:
            raise DataError(f"{self.checkpoint} is not the checkpoint that the run started from: its content has changed (sha256)")


def fingerprint(checkpoint: Path) -> str:
    """sha256 of a checkpoint's content."""
    with checkpoint.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_learned(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint, by their names in the model that `Adapter.apply` returns."""
    tensors = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
