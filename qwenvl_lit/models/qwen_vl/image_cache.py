"""Images as the language model sees them, each encoded once."""

# N images, S side in pixels, Q tokens of an image, D width

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

REMEMBERED = 256  # images; 2 MiB each in bfloat16
TOGETHER = 32  # images that go through the tower at a time


class ImageCache:
    """Encodes images, and remembers the latest by their keys."""

    def __init__(self):
        self.known: OrderedDict[str, torch.Tensor] = OrderedDict()  # key -> (Q, D)

    def __call__(
        self,
        pixel_values: torch.Tensor,
        keys: Sequence[str] | None,
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Images (N, 3, S, S) as (N, Q, D). Of those with equal keys the first is encoded; None: all are, and none is remembered."""
        if keys is None:
            return _in_parts(pixel_values, encode)
        if len(keys) != len(pixel_values):
            raise ValueError(f"{len(keys)} keys for {len(pixel_values)} images")
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        new = [place for key, place in first.items() if key not in self.known]
        if new:
            chosen = pixel_values if len(new) == len(pixel_values) else pixel_values[new]
            for place, features in zip(new, _in_parts(chosen, encode), strict=True):
                self.known[keys[place]] = features
        for key in first:
            self.known.move_to_end(key)
        found = torch.stack([self.known[key] for key in keys])
        while len(self.known) > REMEMBERED:
            self.known.popitem(last=False)
        return found


def _in_parts(
    pixel_values: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return torch.cat([encode(some) for some in pixel_values.split(TOGETHER)])
