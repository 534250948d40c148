"""Caches image features, so that repeated questions about an image do not encode it again."""

# Q tokens of an image, D width of its features

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch

MAX_BYTES = 2**29  # of the features in the cache; those of a batch may be more


class FeatureCache:
    """Encodes images and stores the features of the most recently used ones by key."""

    def __init__(self):
        self.features: OrderedDict[str, torch.Tensor] = OrderedDict()  # key -> (Q, D)

    def __call__(
        self,
        count: int,
        keys: Sequence[str] | None,
        encode: Callable[[Sequence[int]], Iterable[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Returns the features (Q, D) of each image of a batch.

        Args:
            count: the number of images.
            keys: a key for each image. Images with the same key are encoded only once. With None,
                every image is encoded and none is stored.
            encode: computes the features of the images with these indices.

        Raises:
            ValueError: the numbers of keys and images differ.
        """
        if keys is None:
            return list(encode(range(count)))
        if len(keys) != count:
            raise ValueError(f"{len(keys)} keys for {count} images")
        first_index: dict[str, int] = {}
        for index, key in enumerate(keys):
            first_index.setdefault(key, index)
        new = [index for key, index in first_index.items() if key not in self.features]
        for index, features in zip(new, encode(new), strict=True):
            self.features[keys[index]] = features
        for key in first_index:
            self.features.move_to_end(key)
        result = [self.features[key] for key in keys]
        excess = sum(features.nbytes for features in self.features.values()) - MAX_BYTES
        while excess > 0:
            excess -= self.features.popitem(last=False)[1].nbytes
        return result
