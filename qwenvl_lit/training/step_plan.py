"""Plans how a GPU computes an optimizer step: the size of micro-batches, and recomputed blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qwenvl_lit.data.micro_batches import ActivationCosts
from qwenvl_lit.settings import Checkpointing
from qwenvl_lit.training.memory import (
    Activations,
    MemoryEstimate,
    activations_of,
    estimate_memory,
    training_inputs,
    usable,
)

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family

# A smaller micro-batch leaves a GPU idle between its kernels. On an H200, LoRA took 268 ms for
# 2,560 tokens and 369 ms for 5,120.
EFFICIENT_TOKENS = 4096
PROBE_TOKENS = 512  # tokens of a row from which costs are computed
# Rows, images of a row and supervised tokens of a row
PROBES = ((1, 1, 8), (2, 1, 8), (1, 0, 8), (1, 1, 72))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """How an optimizer step is computed."""

    costs: ActivationCosts
    max_bytes: float
    """The most activation bytes of a micro-batch."""
    count: int | None
    """The number of micro-batches of every step if all ranks need the same one, or None."""
    checkpointed: Sequence[str]
    """Module paths of the blocks that are recomputed."""
    estimate: MemoryEstimate
    """The memory for the largest micro-batch."""
    most_tokens: int
    """The most tokens of a micro-batch, approximately."""
    is_one_batch: bool
    """Whether all rows of every step are one micro-batch."""


def plan_step(
    model: nn.Module,
    family: Family,
    sizes: np.ndarray,
    rows_per_step: int,
    available: float,
    *,
    checkpointing: Checkpointing,
    same_count: bool,
    **options: Any,
) -> StepPlan:
    """Plans micro-batches as large as `available` bytes per GPU allow.

    With `checkpointing` "auto", blocks are recomputed only if micro-batches would otherwise have
    fewer than `EFFICIENT_TOKENS`, or if the largest row would not fit.

    Args:
        model: the network on the meta device with its adapter, in training mode.
        sizes: (3, rows), the `Length` of all rows.
        rows_per_step: rows of an optimizer step on each rank.
        same_count: whether all ranks need the same number of micro-batches.
        options: further arguments of `estimate_memory`.
    """
    with _adapters_in(model, family.dtype):  # autocast does it in the run
        probes = [_Probe.run(model, family, *probe) for probe in PROBES]
    blocks = list(probes[0].activations.blocks)
    tokens = sizes[0].astype(np.int64)

    def estimate(activation_bytes: float) -> MemoryEstimate:
        activations = Activations(blocks={}, outside_blocks=math.floor(activation_bytes))
        return estimate_memory(model, {}, family.components, activations=activations, **options)

    choices = {"none": [0], "full": [len(blocks)], "auto": range(len(blocks) + 1)}[checkpointing]
    for checkpointed in choices:
        costs, fixed = _fit_costs(probes, checkpointed, compiled=options["compiled"])
        of_rows = _costs_of_rows(costs, sizes)
        largest_step = of_rows[:rows_per_step].sum()
        efficient = of_rows.sum() / tokens.sum() * EFFICIENT_TOKENS
        max_bytes = usable(available) - estimate(fixed).total
        if max_bytes >= min(largest_step, max(of_rows[0], efficient)):
            break
    count = None
    if same_count:
        rows_that_fit = max(1, int(max_bytes // of_rows[0]))
        count = -(-rows_per_step // rows_that_fit)
        largest_step = of_rows[: -(-rows_per_step // count)].sum()
    largest = max(of_rows[0], min(largest_step, max_bytes))
    return StepPlan(
        costs=costs,
        max_bytes=max_bytes,
        count=count,
        checkpointed=blocks[:checkpointed],
        estimate=estimate(fixed + largest),
        most_tokens=round(largest * tokens.sum() / of_rows.sum()),
        is_one_batch=count in (None, 1) and largest_step <= max_bytes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Probe:
    """A micro-batch whose activations were counted on the meta device."""

    rows: int
    tokens: int
    image_tokens: int
    targets: int
    activations: Activations

    @classmethod
    def run(cls, model: nn.Module, family: Family, rows: int, images: int, targets: int) -> _Probe:
        inputs = training_inputs(family, rows, tokens=PROBE_TOKENS, images=images, targets=targets)
        return cls(
            rows=rows,
            tokens=inputs["input_ids"].numel(),
            image_tokens=len(inputs.get("vision_positions", ())),
            targets=len(inputs["target_positions"]),
            activations=activations_of(model, inputs),
        )


@contextmanager
def _adapters_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Changes the dtype of trained tensors within a `with` block."""
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    stored = [tensor.data for tensor in trained]
    for tensor in trained:
        tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in zip(trained, stored, strict=True):
            tensor.data = data


def _fit_costs(
    probes: Sequence[_Probe], checkpointed: int, *, compiled: bool
) -> tuple[ActivationCosts, float]:
    """Returns the costs that explain the probes, and the bytes that every micro-batch takes."""
    contents = [[1, probe.tokens, probe.image_tokens, probe.targets] for probe in probes]
    taken = [probe.activations.bytes(checkpointed, compiled=compiled) for probe in probes]
    solution, *_ = np.linalg.lstsq(np.array(contents, float), np.array(taken, float), rcond=None)
    fixed, per_token, per_image_token, per_target = np.maximum(solution, 0).tolist()
    costs = ActivationCosts(
        per_token=per_token, per_image_token=per_image_token, per_target=per_target
    )
    return costs, math.ceil(fixed)


def _costs_of_rows(costs: ActivationCosts, sizes: np.ndarray) -> np.ndarray:
    """Returns the costs (rows,) of all rows, the largest first."""
    tokens, targets, image_tokens = sizes.astype(np.float64)
    text = costs.per_token * tokens + costs.per_target * targets
    return np.sort(text + costs.per_image_token * image_tokens)[::-1]
