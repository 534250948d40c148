"""Positions of the tokens of a sample on three axes: time, height and width."""

# T tokens of a sample

from __future__ import annotations

from collections.abc import Iterable

import torch


def axis_positions(length: int, images: Iterable[tuple[int, int, int]]) -> torch.Tensor:
    """Returns the positions (3, T) of a sample, int64.

    A text token has the same position on all axes. The tokens of an image share their time, and
    count rows and columns from there. The text after an image continues behind the image's longer
    side.

    Args:
        length: T.
        images: for each image in reading order the index of its first token, and its height and
            width in tokens.

    >>> axis_positions(7, [(1, 2, 2)])
    tensor([[0, 1, 1, 1, 1, 3, 4],
            [0, 1, 1, 2, 2, 3, 4],
            [0, 1, 2, 1, 2, 3, 4]])
    """
    parts = []
    index = position = 0  # of the next token
    for start, height, width in images:
        text = start - index
        parts.append(torch.arange(position, position + text).expand(3, -1))
        position += text
        rows = torch.arange(height).repeat_interleave(width)
        columns = torch.arange(width).repeat(height)
        parts.append(torch.stack((torch.zeros_like(rows), rows, columns)) + position)
        position += max(height, width)
        index = start + height * width
    parts.append(torch.arange(position, position + length - index).expand(3, -1))
    return torch.cat(parts, dim=1)
