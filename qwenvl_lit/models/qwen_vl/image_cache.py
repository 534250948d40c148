"""Caches image features, so that repeated questions about an image do not encode it again."""

# N images, S image side in pixels, Q tokens of an image, D model width

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

MAX_IMAGES = 256  # images in the cache. An image takes 2 MiB in bfloat16.
IMAGES_PER_PASS = 32  # images that are encoded as one batch


class ImageCache:
    """Encodes images and stores the features of the most recently used ones by key."""

    def __init__(self):
        self.features: OrderedDict[str, torch.Tensor] = OrderedDict()  # key -> (Q, D)

    def __call__(
        self,
        pixel_values: torch.Tensor,
        keys: Sequence[str] | None,
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Returns the features (N, Q, D) of images (N, 3, S, S).

        Args:
            keys: a key for each image. Images with the same key are encoded only once. With None,
                every image is encoded and none is stored.
            encode: computes the features of a batch of images.

        Raises:
            ValueError: the numbers of keys and images differ.
        """
        if keys is None:
            return _encode_in_passes(pixel_values, encode)
        if len(keys) != len(pixel_values):
            raise ValueError(f"{len(keys)} keys for {len(pixel_values)} images")
        first_index: dict[str, int] = {}
        for index, key in enumerate(keys):
            first_index.setdefault(key, index)
        new = [index for key, index in first_index.items() if key not in self.features]
        if new:
            all_new = len(new) == len(pixel_values)
            new_pixels = pixel_values if all_new else pixel_values[new]
            encoded = _encode_in_passes(new_pixels, encode)
            for index, features in zip(new, encoded, strict=True):
                self.features[keys[index]] = features
        for key in first_index:
            self.features.move_to_end(key)
        result = torch.stack([self.features[key] for key in keys])
        while len(self.features) > MAX_IMAGES:
            self.features.popitem(last=False)
        return result


def _encode_in_passes(
    pixel_values: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return torch.cat([encode(batch) for batch in pixel_values.split(IMAGES_PER_PASS)])
