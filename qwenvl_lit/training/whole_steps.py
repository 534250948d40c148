"""Computes all micro-batches of an optimizer step in one call of `training_step`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qwenvl_lit.data.micro_batches import CutStep
from qwenvl_lit.training.memory import free_unused_memory
from qwenvl_lit.types import Batch

log = logging.getLogger(__name__)


def add_gradients(
    micro_batches: Sequence[Batch],
    cut: CutStep,
    *,
    start: Callable[[], object],
    loss: Callable[[Batch], torch.Tensor],
    cut_again: Callable[[Sequence[Batch]], Sequence[Batch]],
) -> None:
    """Adds up the gradients of an optimizer step.

    If the GPU runs out of memory, the step starts again with smaller micro-batches, which later
    steps use as well.

    Args:
        start: resets the gradients.
        loss: computes the loss of a micro-batch.
        cut_again: encodes the rows again, and cuts them within the lowered limit.

    Raises:
        torch.OutOfMemoryError: a single row exceeds the memory; or, with FSDP, the other ranks
            compute with the old micro-batches.
    """
    while True:
        if not cut.fits(micro_batches):  # cut by a data worker before the limit was lowered
            micro_batches = cut_again(micro_batches)
        start()
        try:
            for batch in micro_batches:
                _backward(loss(batch))
            return
        except torch.OutOfMemoryError:
            if cut.count is not None or not cut.halve(micro_batches):
                raise
        rows = max(len(batch.conversations) for batch in micro_batches)
        log.warning(
            "the GPU ran out of memory with %d rows in a micro-batch: continuing with half of that",
            rows,
        )
        free_unused_memory()


def _backward(loss: torch.Tensor) -> None:
    with torch.autocast(loss.device.type, enabled=False):  # `training_step` runs under autocast
        loss.backward()


def zero_loss(model: nn.Module) -> torch.Tensor:
    """Returns a zero whose gradients, all zero, make DDP sum those of `add_gradients` over ranks.

    DDP sums gradients in the backward pass that follows `training_step`.
    """
    return _Zero.apply(*(tensor for tensor in model.parameters() if tensor.requires_grad))


class _Zero(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, *tensors: torch.Tensor) -> torch.Tensor:
        context.like = tensors
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.new_zeros(()).expand_as(tensor) for tensor in context.like)
