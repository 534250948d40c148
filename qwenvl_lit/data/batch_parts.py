"""Splits batches into batches of fewer rows, or of rows of one kind."""

from __future__ import annotations

from itertools import pairwise

import torch

from qwenvl_lit.types import Batch


def split_batch(batch: Batch, rows: int) -> list[Batch]:
    """Splits a batch of padded rows into batches of at most `rows` rows, in order.

    The parts are padded as the batch is. The reasons of dropped rows stay with the first part.
    """
    count = len(batch.conversations)
    if count <= rows:
        return [batch]
    return [_part(batch, first, min(first + rows, count)) for first in range(0, count, rows)]


def split_by_options(batch: Batch) -> list[Batch]:
    """Splits a batch of prompts where rows with options and rows without meet, in order."""
    kinds = [bool(row.options) for row in batch.conversations]
    starts = [index for index in range(1, len(kinds)) if kinds[index] != kinds[index - 1]]
    if not starts:
        return [batch]
    bounds = pairwise([0, *starts, len(kinds)])
    return [_part(batch, first, end) for first, end in bounds]


def _part(batch: Batch, first: int, end: int) -> Batch:
    assert batch.attention_mask is not None, "packed rows cannot be split"
    width = batch.input_ids.shape[1]
    start, stop = first * width, end * width
    vision = {}
    # A batch concatenates the tensors of its images, which all have the same number of positions.
    before, until = (int((batch.vision_positions < bound).sum()) for bound in (start, stop))
    for name, values in batch.vision.items():
        positions_per_image = max(1, len(batch.vision_positions) // max(1, len(values)))
        vision[name] = values[before // positions_per_image : until // positions_per_image]
    return Batch(
        conversations=batch.conversations[first:end],
        input_ids=batch.input_ids[first:end],
        labels=batch.labels[first:end],
        attention_mask=batch.attention_mask[first:end],
        position_ids=None,
        lengths=batch.lengths[first:end],
        vision_positions=_between(batch.vision_positions, start, stop),
        target_positions=_between(batch.target_positions, start, stop),
        vision=vision,
        dropped=batch.dropped if first == 0 else (),
    )


def _between(positions: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return positions[(positions >= start) & (positions < stop)] - start
