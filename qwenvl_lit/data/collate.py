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
            lengths=tuple(len(sample.input_ids) for sample in samples),
            vision_positions=torch.cat(vision_positions),
            target_positions=target_positions(labels),
            vision=_concatenate(samples),
            dropped=dropped,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """All samples in one row, padded to `max_tokens`; positions restart with each, and none sees another. Dropped rows are left out; if no
    row is left, all is padding, so that a step can be made and no rank waits.

    Whatever the samples, the row and its bounds have the same shapes: code for them is compiled once.

    >>> batch = Pack(pad_id=0, max_tokens=6, max_rows=2, longest=3)([sample_of_2, sample_of_3])      # doctest: +SKIP
    >>> batch.position_ids, batch.segment_bounds      # doctest: +SKIP
    (tensor([[0, 1, 0, 1, 2, 0]]), tensor([0, 2, 5, 6, 6, 6]))

    Args:
        max_rows: no batch has more samples.
        longest: no sample has more tokens; segments of padding have no more either.

    Raises:
        ValueError: samples that are more or longer.
    """

    pad_id: int
    max_tokens: int
    max_rows: int
    longest: int

    def __call__(self, rows: Sequence[Sample | Dropped]) -> Batch:
        samples, dropped = _parted(rows)
        lengths = [len(sample.input_ids) for sample in samples]
        if (
            sum(lengths) > self.max_tokens
            or len(lengths) > self.max_rows
            or max(lengths, default=0) > self.longest
        ):
            raise ValueError(
                f"{len(lengths)} samples of {sum(lengths)} tokens, the longest of {max(lengths)}, do not fit into {self}"
            )
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        places = [
            sample.vision_positions + start for sample, start in zip(samples, starts, strict=True)
        ]
        rest = self.max_tokens - sum(lengths)
        segments = [*lengths, *[self.longest] * (rest // self.longest), rest % self.longest]
        empty = self.max_rows + self.max_tokens // self.longest + 1 - len(segments)
        bounds = torch.tensor([0, *segments, *[0] * empty]).cumsum(0, dtype=torch.int32)
        labels = torch.cat([*(sample.labels for sample in samples), torch.full((rest,), IGNORED)])
        labels[starts] = IGNORED  # else the sample before would learn to predict them
        return Batch(
            conversations=tuple(sample.conversation for sample in samples),
            input_ids=torch.cat(
                [*(sample.input_ids for sample in samples), torch.full((rest,), self.pad_id)]
            )[None],
            labels=labels[None],
            attention_mask=None,
            position_ids=torch.cat(
                [*map(torch.arange, lengths), torch.zeros(rest, dtype=torch.int64)]
            )[None],
            lengths=tuple(lengths),
            vision_positions=torch.cat(places) if places else torch.empty(0, dtype=torch.int64),
            target_positions=target_positions(labels[None]),
            vision=_concatenate(samples) if samples else {},
            dropped=dropped,
            segment_bounds=bounds,
            longest_segment=self.longest,
        )


def nothing(pad_id: int, dropped: tuple[str, ...] = ()) -> Batch:
    """What a padded batch is of which no row is left: nothing to learn, and yet a step can be made, so that no rank waits."""
    input_ids = torch.full((1, 2), pad_id)
    empty = torch.empty(0, dtype=torch.int64)
    return Batch(
        conversations=(),
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORED),
        attention_mask=torch.ones_like(input_ids),
        position_ids=None,
        lengths=(),
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
    return [row for row in rows if not isinstance(row, Dropped)], tuple(
        str(row) for row in rows if isinstance(row, Dropped)
    )


def _concatenate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    return {
        name: _joined([sample.vision[name] for sample in samples]) for name in samples[0].vision
    }


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`, in a worker straight into the memory through which it reaches the trainer: one copy, not two."""
    first = parts[0]
    if get_worker_info() is None:
        return torch.cat(parts) if len(parts) > 1 else first
    shape = (sum(map(len, parts)), *first.shape[1:])
    shared = first._typed_storage()._new_shared(math.prod(shape), device=first.device)
    return torch.cat(parts, out=first.new(shared).resize_(shape))
