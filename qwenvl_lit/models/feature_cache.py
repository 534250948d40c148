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
        self.size = 0  # in bytes

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
            encode: computes the features of the images with these indices, one or more.

        Raises:
            ValueError: the numbers of keys and images differ.
        """
        if keys is None:
            return list(encode(range(count)))
        check_keys(keys, count)
        features: dict[str, torch.Tensor] = {}
        new: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key in features or key in new:
                continue
            known = self.get(key)
            if known is None:
                new[key] = index
            else:
                features[key] = known
        encoded = encode(list(new.values())) if new else ()
        for key, value in zip(new, encoded, strict=True):
            features[key] = self.add(key, value)
        return [features[key] for key in keys]

    def get(self, key: str) -> torch.Tensor | None:
        """Returns the features that are stored for a key, which is then the latest used."""
        if key in self.features:
            self.features.move_to_end(key)
        return self.features.get(key)

    def add(self, key: str, features: torch.Tensor) -> torch.Tensor:
        """Stores a copy of the features of an image, and returns the copy.

        The features themselves may be a part of those of many images, whose memory they hold.
        """
        features = features.clone()
        self.features[key] = features
        self.size += features.nbytes
        while self.size > MAX_BYTES:
            self.size -= self.features.popitem(last=False)[1].nbytes
        return features


def check_keys(keys: Sequence[str], count: int) -> None:
    """Raises ValueError unless there is a key for each image."""
    if len(keys) != count:
        raise ValueError(f"{len(keys)} keys for {count} images")
