"""Chooses how many rows are evaluated together, and whether the decoder is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import lightning
import torch
from torch import nn

from qwenvl_lit.data.evaluation_batches import (
    DEFAULT_ROWS,
    BatchChoice,
    EvaluationPlan,
    RowSizes,
)
from qwenvl_lit.generation.compilation import COMPILE_SECONDS, seconds_saved
from qwenvl_lit.terminal import counted
from qwenvl_lit.training.memory import FRAGMENTATION
from qwenvl_lit.training.optim import local_tensor
from qwenvl_lit.training.strategies import DeviceMapStrategy, sharding_of

if TYPE_CHECKING:
    from qwenvl_lit.generation.generation import Generation
    from qwenvl_lit.models.protocols import Family

# Prompts and answers together: 1,001 tokens/s at 8 rows, 3,288 at 32 and 7,803 at 128 on an H100
# (benchmarks/generate.json), where a step of 128 rows is no longer bound by reading the weights.
MOST_ROWS = 128
# Of a batch whose loss is computed. More tokens would take more memory and not be faster.
LOSS_TOKENS = 16384
SMALL_MODEL = 1e8  # parameters; a CPU reads the weights of such a model in a few milliseconds
EVEN = 8  # a number of rows above it is a multiple of it, for which kernels are made


def choose_rows(
    sizes: RowSizes,
    *,
    model: nn.Module,
    family: Family,
    generation: Generation,
    trainer: lightning.Trainer,
) -> BatchChoice:
    """Chooses how many rows of a set are evaluated together: 128, or as many as fit."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        small = sum(tensor.numel() for tensor in model.parameters()) < SMALL_MODEL
        where = f"on a {device.type.upper()}"
        if small:
            return _choice(sizes, MOST_ROWS, f"a small model {where}")
        return _choice(sizes, DEFAULT_ROWS, where)
    if sharding_of(trainer)[0] == "fsdp" or isinstance(trainer.strategy, DeviceMapStrategy):
        return _choice(sizes, DEFAULT_ROWS, "the model is spread over devices")
    most, reason = MOST_ROWS, "more are hardly faster"
    if not sizes.answered:
        most = _even(min(most, max(1, LOSS_TOKENS // sizes.tokens)))
    available = free_memory(device) - state_to_come(model, trainer)
    rows = rows_that_fit(sizes, min(most, sizes.rows), family, generation, available)
    if rows < min(most, sizes.rows):
        most, reason = rows, "more do not fit into GPU memory"
    return _choice(sizes, most, reason)


def rows_that_fit(
    sizes: RowSizes, most: int, family: Family, generation: Generation, available: float
) -> int:
    """Returns the most rows, up to `most`, whose evaluation takes at most `available` bytes.

    At least 1, even if that does not fit.
    """
    rows = most
    while rows > 1 and batch_bytes(sizes, rows, family, generation) > available:
        rows = _even(rows - 1)
    return rows


def batch_bytes(sizes: RowSizes, rows: int, family: Family, generation: Generation) -> int:
    """Returns the bytes that the evaluation of `rows` rows takes in addition to the weights."""
    if not sizes.answered:
        return family.loss_memory(
            rows=rows,
            tokens=sizes.tokens,
            image_tokens=sizes.image_tokens,
            supervised=sizes.supervised,
        )
    beams = generation.num_beams
    return family.answering_memory(
        rows=rows * beams,
        tokens=sizes.tokens,
        image_tokens=sizes.image_tokens,
        new_tokens=generation.max_new_tokens,
        at_once=beams > 1 or sizes.options,
    )


def free_memory(device: torch.device) -> float:
    """Returns the bytes of a GPU that tensors can take."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + cached) / FRAGMENTATION


def state_to_come(model: nn.Module, trainer: lightning.Trainer) -> int:
    """Returns the bytes of gradients and optimizer states that training has yet to create."""
    if trainer.state.fn != "fit":
        return 0
    states = [optimizer.state for optimizer in trainer.optimizers]
    missing = 0
    for tensor in model.parameters():
        if not tensor.requires_grad:
            continue
        size = local_tensor(tensor).numel() * tensor.dtype.itemsize
        missing += size * (tensor.grad is None)
        missing += 2 * size * (not any(tensor in state for state in states))  # AdamW's two moments
    return missing


def batch_lines(plans: Mapping[str, EvaluationPlan]) -> Iterator[str]:
    """Yields lines that say how many rows of which sets are evaluated together, and why."""
    sets: dict[BatchChoice, list[str]] = {}
    for name, plan in plans.items():
        if plan.batches.reason:
            sets.setdefault(plan.batches, []).append(name)
    for batches, names in sets.items():
        rows = counted(batches.rows, "row")
        of = f" of {', '.join(names)}" if len(sets) > 1 else ""
        yield f"Batches of {rows}{of}: {batches.reason} (data.eval_batch_size=auto)"


def compilation_saves(plans: Mapping[str, EvaluationPlan], generation: Generation) -> float:
    """Returns the seconds that compiling the decoder saves on all sets, its cost subtracted."""
    if generation.num_beams > 1:
        return -COMPILE_SECONDS  # transformers decodes
    saved = 0.0
    for plan in plans.values():
        saved += seconds_saved(
            plan.prompt_tokens,
            plan.answer_tokens,
            min_new_tokens=generation.min_new_tokens,
            max_new_tokens=generation.max_new_tokens,
        )
    return saved - COMPILE_SECONDS


def _choice(sizes: RowSizes, most: int, reason: str) -> BatchChoice:
    if sizes.rows <= most:
        return BatchChoice(rows=sizes.rows, reason="all rows of a process")
    return BatchChoice(rows=most, reason=reason)


def _even(rows: int) -> int:
    return rows // EVEN * EVEN if rows > EVEN else rows
