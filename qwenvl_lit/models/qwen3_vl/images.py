"""Resizes images and cuts them into patches, bit-exactly as the published image processors do."""

# P patches of an image, C channels, p side of a patch in pixels

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwenvl_lit.types import BadImage, ImageSource

MAX_ASPECT_RATIO = 200  # of the published processors
FRAMES = 2  # that a patch covers; those of an image are equal


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """The settings of `preprocessor_config.json` that change the pixels.

    Args:
        patch_size: side of a patch in pixels.
        merge_size: side of the square of patches that becomes a token.
        min_pixels, max_pixels: an image with fewer or more pixels is scaled up or down.
        mean, std: of the channels R, G and B of images in 0..1.
    """

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"model.min_pixels={self.min_pixels} is above model.max_pixels={self.max_pixels}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def resized(self, image: ImageSource) -> tuple[int, int]:
        """Returns the width and height of the resized image, from the header alone.

        Raises:
            BadImage: the image cannot be read, or is too narrow.
        """
        width, height = image.size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise BadImage(
                f"image {image.name} has {width} x {height} px; its longer side may be at most "
                f"{MAX_ASPECT_RATIO} times its shorter one: crop it, or remove the row"
            )
        factor = self.patch_size * self.merge_size
        return smart_resize(width, height, factor, self.min_pixels, self.max_pixels)

    def grid(self, image: ImageSource) -> tuple[int, int]:
        """Returns the height and width of the resized image in patches."""
        width, height = self.resized(image)
        return height // self.patch_size, width // self.patch_size

    def tokens(self, image: ImageSource) -> int:
        """Returns the number of tokens of the image."""
        height, width = self.grid(image)
        return height * width // self.merge_size**2

    def patches(self, image: ImageSource) -> torch.Tensor:
        """Returns the patches of the resized image before normalization, (P, C * p * p) uint8.

        The patches of a token follow each other. Data workers pass images in this form, which takes
        an eighth of the bytes of `normalize_patches`.

        Raises:
            BadImage: the image cannot be read, or is too narrow.
        """
        size = self.resized(image)
        resized = image.open().convert("RGB").resize(size, Image.Resampling.BICUBIC)
        width, height = size
        patch, merge = self.patch_size, self.merge_size
        rows, columns = height // (patch * merge), width // (patch * merge)
        pixels = np.asarray(resized).reshape(rows, merge, patch, columns, merge, patch, 3)
        ordered = pixels.transpose(0, 3, 1, 4, 6, 2, 5)  # rows, columns, merge, merge, C, p, p
        return torch.from_numpy(ordered.reshape(-1, 3 * patch * patch))


def smart_resize(
    width: int, height: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Returns a width and a height that are multiples of `factor`, close to the aspect ratio.

    Their product is from `min_pixels` to `max_pixels`, unless the image is very narrow.

    >>> smart_resize(640, 427, 28, 3136, 1003520)
    (644, 420)
    """
    new_width, new_height = (round(side / factor) * factor for side in (width, height))
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
    elif new_width * new_height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        new_width = math.ceil(width * scale / factor) * factor
        new_height = math.ceil(height * scale / factor) * factor
    return new_width, new_height


def normalize_patches(
    patches: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Converts (P, C * p * p) uint8 to pixels of the network, (P, C * FRAMES * p * p) float32.

    The result is bit-identical on all devices.
    """
    channels = len(mean)
    levels = _normalized_levels(mean, std, patches.device)
    first_level = torch.arange(channels, dtype=torch.int32, device=patches.device)[:, None] * 256
    values = patches.view(len(patches), channels, -1) + first_level
    pixels = levels[values]  # (P, C, p * p)
    return pixels[:, :, None].expand(-1, -1, FRAMES, -1).reshape(len(patches), -1)


@lru_cache
def _normalized_levels(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """Returns the pixels of all values 0..255 of each channel, (C * 256,) float32.

    They are computed once, on the host: a step would otherwise wait for the copy to the device.
    """
    # The published processors scale in double precision.
    levels = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
    table = (levels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    return table.flatten().to(device)
