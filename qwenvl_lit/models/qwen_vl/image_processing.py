"""Images as Qwen-VL's tower takes them, to the same bits as the original's preprocessing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

# CLIP's, as floats of the channels R, G, B
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """The image as (3, size, size) float32: alpha dropped, proportions not kept, no EXIF rotation, CLIP's normalisation."""
    return normalised(resized(image, size)[None])[0]


def resized(image: Image.Image, size: int) -> torch.Tensor:
    """The image before its normalisation, (size, size, 3) uint8: a quarter of the bytes to bring from a worker to the model."""
    return torch.from_numpy(
        np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    )


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """(N, size, size, 3) uint8 as (N, 3, size, size) float32, to the same bits on any device."""
    values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for apply, constant in zip(
        (values.div_, values.sub_, values.div_), _constants(pixels.device), strict=True
    ):
        apply(constant)
    return values


@lru_cache
def _constants(device: torch.device) -> tuple[torch.Tensor, ...]:
    """As tensors: CUDA divides by a number by multiplying with its inverse, which is not the same."""
    return torch.tensor(255.0, device=device), MEAN.to(device), STD.to(device)
