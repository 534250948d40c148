"""Loads a model for training or inference, with checkpoints, quantization and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwenvl_lit.training.adapters.merging import StartingCheckpoint, apply_trained
from qwenvl_lit.training.adapters.methods import warn_of_few_layers

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family
    from qwenvl_lit.training.adapters.methods import Adapter


def load_model(
    family: Family,
    adapter: Adapter | None,
    device: torch.device | str,
    *,
    init: StartingCheckpoint | None = None,
    trained_checkpoint: Path | None = None,
) -> nn.Module:
    """Loads the family's network to `device` and applies `adapter` to it.

    Args:
        init: a checkpoint that is merged into the base weights before the adapter is applied.
        trained_checkpoint: a checkpoint with the tensors that `adapter` trained.

    Raises:
        DataError: a checkpoint does not exist, or belongs to another model or adapter.
    """
    if trained_checkpoint and adapter and adapter.trains_base_weights and family.quantization:
        # 4-bit weights cannot be overwritten. The trained weights are merged before quantization.
        init = StartingCheckpoint(
            checkpoint=str(trained_checkpoint), sha256=None, adapter=adapter, init=init
        )
        adapter = trained_checkpoint = None
    quantization = family.quantization
    if adapter and adapter.quantization:
        quantization = adapter.quantization
    if init is None:
        model = family.load(device, quantization=quantization)
    elif quantization is None:
        model = init.merge_into(family.load(device), family)
    else:
        # Merging needs unquantized weights, for which `device` may not have enough memory.
        model = init.merge_into(family.load("cpu"), family)
        model = family.quantize(model, device, quantization)
    if adapter and trained_checkpoint:
        model = apply_trained(adapter, model, family, trained_checkpoint)
    elif adapter:
        model = adapter.apply(model, family)
        warn_of_few_layers(model, family)
    return model
