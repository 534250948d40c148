"""What earlier runs learned, merged into the base weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from qwenvl_lit.models.components import network_of
from qwenvl_lit.training.adapters.methods import Adapter
from qwenvl_lit.training.adapters.peft_files import PEFT_FILES, peft_names, read_peft_file
from qwenvl_lit.types import DataError


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
