"""Samples to a batch. Positions become flat indices here, in the worker, so that nothing in a training step has to search for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import get_worker_info

from qwenvl_lit.types import Batch, Dropped, Sample

IGNORED = -100  # label of a token that is not learned


@dataclass(frozen=True, kw_only=True, slots=True)
class Pad:
    """One row a sample, filled up to the longest: on the right to train, on the left to generate. Dropped rows are left out.

    >>> Pad(pad_id=0, side="left")([sample_of_2, sample_of_3]).attention_mask      # doctest: +SKIP
    tensor([[0, 1, 1], [1, 1, 1]])
    """

    pad_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[Sample | Dropped]) -> Batch:
        samples, dropped = _parted(rows)
        if not samples:
            return nothing(self.pad_id, dropped)
        length = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), length), self.pad_id)
        labels = torch.full_like(input_ids, IGNORED)
        attention_mask = torch.zeros_like(input_ids)
        vision_positions = []
        for row, sample in enumerate(samples):
            start = length - len(sample.input_ids) if self.side == "left" else 0
            stop = start + len(sample.input_ids)
            input_ids[row, start:stop] = sample.input_ids
            labels[row, start:stop] = sample.labels
            attention_mask[row, start:stop] = 1
            vision_positions.append(sample.vision_positions + row * length + start)
        return Batch(
            conversations=tuple(sample.conversation for sample in samples),
            input_ids=input_ids,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=None,
            vision_positions=torch.cat(vision_positions),
            target_positions=target_positions(labels),
            vision=_concatenate(samples),
            dropped=dropped,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """All samples in one row without padding; positions restart with each, and none sees another. Dropped rows are left out.

    >>> Pack(pad_id=0)([sample_of_2, sample_of_3]).position_ids      # doctest: +SKIP
    tensor([[0, 1, 0, 1, 2]])
    """

    pad_id: int

    def __call__(self, rows: Sequence[Sample | Dropped]) -> Batch:
        samples, dropped = _parted(rows)
        if not samples:
            return nothing(self.pad_id, dropped)
        lengths = [len(sample.input_ids) for sample in samples]
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        labels = torch.cat([sample.labels for sample in samples])
        labels[starts] = IGNORED  # else the sample before would learn to predict them
        return Batch(
            conversations=tuple(sample.conversation for sample in samples),
            input_ids=torch.cat([sample.input_ids for sample in samples])[None],
            labels=labels[None],
            attention_mask=None,
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            vision_positions=torch.cat([sample.vision_positions + start for sample, start in zip(samples, starts, strict=True)]),
            target_positions=target_positions(labels[None]),
            vision=_concatenate(samples),
            dropped=dropped,
        )


def nothing(pad_id: int, dropped: tuple[str, ...] = ()) -> Batch:
    """What a batch is of which no row is left: two pad tokens and nothing to learn, so that a step can be made and no rank waits."""
    input_ids = torch.full((1, 2), pad_id)
    empty = torch.empty(0, dtype=torch.int64)
    return Batch(
        conversations=(),
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORED),
        attention_mask=torch.ones_like(input_ids),
        position_ids=None,
        vision_positions=empty,
        target_positions=empty,
        vision={},
        dropped=dropped,
    )


def target_positions(labels: torch.Tensor) -> torch.Tensor:
    """Flat indices (S,) into `labels` (B, T) of the tokens whose successor in the same row is supervised.

    >>> target_positions(torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]]))
    tensor([1, 2, 4])
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    return predicts.flatten().nonzero().squeeze(1)


def _parted(rows: Sequence[Sample | Dropped]) -> tuple[list[Sample], tuple[str, ...]]:
    return [row for row in rows if not isinstance(row, Dropped)], tuple(str(row) for row in rows if isinstance(row, Dropped))


def _concatenate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    return {name: _joined([sample.vision[name] for sample in samples]) for name in samples[0].vision}


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`, in a worker straight into the memory through which it reaches the trainer: one copy, not two."""
    first = parts[0]
    if get_worker_info() is None:
        return torch.cat(parts) if len(parts) > 1 else first
    shape = (sum(map(len, parts)), *first.shape[1:])
    shared = first._typed_storage()._new_shared(math.prod(shape), device=first.device)
    return torch.cat(parts, out=first.new(shared).resize_(shape))
