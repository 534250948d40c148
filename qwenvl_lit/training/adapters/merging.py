"""Checkpoints that a run starts from, and how they are merged into the base weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwenvl_lit.models.components import network_of
from qwenvl_lit.stored_files import check_finite, read_checkpoint
from qwenvl_lit.terminal import counted
from qwenvl_lit.training.adapters.methods import Adapter
from qwenvl_lit.training.adapters.peft_files import (
    CONFIG,
    PEFT_FILES,
    peft_names,
    read_peft_file,
    targets_without_tensors,
)
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family

log = logging.getLogger(__name__)


class StartingCheckpoint:
    """The checkpoint of an earlier run, merged into the weights before another adapter is applied.

    Args:
        checkpoint: a checkpoint file of the earlier run.
        sha256: `fingerprint` of the file when the later run started; None: not checked.
        adapter: the method that trained the checkpoint.
        init: the checkpoint that the earlier run had started from.
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

    def merge_into(self, model: nn.Module, family: Family) -> nn.Module:
        """Returns `model`, the family's network, with this checkpoint and those before it merged.

        The model keeps its class, and the same tensors require gradients as before.

        Raises:
            DataError: the checkpoint is missing, has changed, or belongs to another model.
        """
        if self.init:
            model = self.init.merge_into(model, family)
        self.check()
        trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
        adapted = apply_trained(self.adapter, model, family, self.checkpoint)
        merged = self.adapter.merge(adapted)
        for name, tensor in merged.named_parameters():
            tensor.requires_grad_(name in trainable)
        return merged

    def check(self) -> None:
        """Raises DataError if the checkpoint is missing or has changed."""
        if not self.checkpoint.exists():
            raise DataError(
                f"{self.checkpoint} is missing, and the run started from it: "
                f"put it back, or give its new path with init.checkpoint=PATH"
            )
        if self.sha256 is not None and fingerprint(self.checkpoint) != self.sha256:
            raise DataError(
                f"{self.checkpoint} is not the checkpoint that the run started from: "
                f"its content has changed (sha256)"
            )


class MergedWeights:
    """Merges a checkpoint into weights that are read one tensor at a time.

    At most one layer is in memory at once, so that a model can be exported on a small machine. An
    instance is a function from the name of a tensor in the family's network to its merged value.

    Args:
        read: returns a tensor of the weights before the merge, by its name in the network.
        adapter: the method that trained the checkpoint.
        checkpoint: a run's checkpoint, or the weights file of a peft folder.
        dtype: the precision in which adapters are added to their layers; None: that of the
            layer's weights, as in `Adapter.merge`.

    Raises:
        DataError: the checkpoint belongs to another model.
    """

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        *,
        family: Family,
        adapter: Adapter,
        checkpoint: Path,
        dtype: torch.dtype | None = None,
    ):
        self.read = read
        self.dtype = dtype
        # The trained tensors have values from the checkpoint; all others stay on the meta device.
        adapted = apply_trained(adapter, family.meta_model(), family, checkpoint, assign=True)
        self._network = network_of(adapted)
        # The last merged layer: a name is read for the weight of a layer, then for its bias.
        self._merged_path = ""
        self._merged_tensors: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        module = self._network.get_submodule(path)
        # peft wraps a layer that is trained whole (`modules_to_save`) or has an adapter on it
        # (`base_layer`).
        if hasattr(module, "modules_to_save"):
            return module.modules_to_save["default"].get_parameter(leaf)
        if not hasattr(module, "base_layer"):
            return self._value(name, getattr(module, leaf))
        if self._merged_path != path:
            self._merged_tensors = self._merge(path, module)
            self._merged_path = path
        return self._merged_tensors[leaf]

    def _value(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The trained value of a tensor, or the one from before the merge."""
        return self.read(name) if tensor.is_meta else tensor.detach()

    def _merge(self, path: str, layer: nn.Module) -> dict[str, torch.Tensor]:
        """Fills a layer with weights, lets peft merge them, and leaves the layer as it was."""
        inner = layer.base_layer
        original = dict(inner.named_parameters())
        for leaf, tensor in original.items():
            value = self._value(f"{path}.{leaf}", tensor)
            value = value.to(self.dtype or value.dtype, copy=True)
            setattr(inner, leaf, nn.Parameter(value, requires_grad=False))
        layer.merge()
        layer.merged_adapters.clear()  # else peft would skip the layer if it is merged again
        merged = {leaf: tensor.detach() for leaf, tensor in inner.named_parameters()}
        for leaf, tensor in original.items():
            setattr(inner, leaf, tensor)
        return merged


def fingerprint(checkpoint: Path) -> str:
    """Returns the sha256 of a file's content."""
    with checkpoint.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def apply_trained(
    adapter: Adapter, model: nn.Module, family: Family, checkpoint: Path, *, assign: bool = False
) -> nn.Module:
    """Returns the model to train, as `Adapter.apply` does, with the tensors of a checkpoint.

    Args:
        assign: replace the model's tensors, which may be on the meta device, instead of copying.

    Raises:
        DataError: the checkpoint does not hold exactly the tensors that `adapter` trains.
    """
    is_peft_file = checkpoint.name in PEFT_FILES
    try:
        adapted = adapter.apply(model, family)
    except ValueError as error:
        if not is_peft_file:
            raise
        raise DataError(
            f"{checkpoint} does not fit this model; is it the base model that the adapter was "
            f"made for? {error}"
        ) from error
    load_trained_state(adapted, checkpoint, assign=assign)
    if is_peft_file:
        _say_ignored(checkpoint, tuple(targets_without_tensors(checkpoint.parent, adapted)))
    return adapted


@cache
def _say_ignored(checkpoint: Path, layers: tuple[str, ...]) -> None:
    """Warns of targets without tensors, once for each file."""
    if layers:
        log.warning(
            "%s has no tensors for %s, which target_modules of its %s names: not adapted",
            *(checkpoint, ", ".join(layers), CONFIG),
        )


def load_trained_state(adapted: nn.Module, checkpoint: Path, *, assign: bool = False) -> None:
    """Loads the trained tensors of a checkpoint; see `apply_trained`."""
    state = adapted.state_dict()
    trained = [name for name, tensor in adapted.named_parameters() if tensor.requires_grad]
    tensors = read_trained_state(checkpoint, adapted)
    try:
        check_trained_names(tensors, trained)
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape:
                found, expected = tuple(tensor.shape), tuple(state[name].shape)
                raise ValueError(f"{name} has shape {found}, expected {expected}")
    except ValueError as error:
        raise DataError(f"{checkpoint} belongs to another model or adapter: {error}") from error
    for name, tensor in tensors.items():
        check_finite(checkpoint, name, tensor)
    adapted.load_state_dict(tensors, strict=False, assign=assign)


def check_trained_names(stored: Iterable[str], trained: Iterable[str]) -> None:
    """Raises ValueError unless a checkpoint holds exactly the tensors that a model trains."""
    stored, trained = set(stored), set(trained)
    for problem, names in (("lacks", trained - stored), ("has unknown", stored - trained)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ValueError(f"the checkpoint {problem} trained tensors, {len(names)}: {shown}")


def read_trained_state(checkpoint: Path, adapted: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors of a run's checkpoint, or of the weights file of a peft folder.

    Args:
        adapted: the model that `Adapter.apply` returned, whose names the tensors get.

    Raises:
        DataError: the file is damaged, or has a tensor that the model does not have.
    """
    if checkpoint.name not in PEFT_FILES:
        tensors = read_checkpoint(checkpoint)["state_dict"].items()
        return {name.removeprefix("model."): tensor for name, tensor in tensors}
    tensors = read_peft_file(checkpoint)
    names = peft_names(adapted)
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise DataError(
            f"{checkpoint} has {counted(len(unknown), 'tensor')} that this model does not have "
            f"({', '.join(unknown[:3])}, ...): is it the base model that the adapter was made for?"
        )
    return {names[name]: tensor for name, tensor in tensors.items()}
