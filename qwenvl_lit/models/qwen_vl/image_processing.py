"""Preprocesses images for Qwen-VL's vision tower, bit for bit as the original does."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

# CLIP's constants of the channels R, G, B.
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """Returns the image as (3, size, size) float32, with CLIP's normalization.

    Alpha is dropped, proportions are not kept, and EXIF rotation is ignored.
    """
    return normalized(resized(image, size)[None])[0]


def resized(image: Image.Image, size: int) -> torch.Tensor:
    """Returns the image before normalization, (size, size, 3) uint8.

    This is a quarter of the bytes to copy from a data worker to the model.
    """
    square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """(N, size, size, 3) uint8 -> (N, 3, size, size) float32, to the same bits on every device."""
    values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    scale, mean, std = _constants(pixels.device)
    return values.div_(scale).sub_(mean).div_(std)


@lru_cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Tensors, because CUDA multiplies by the inverse of a Python number, which rounds differently.
    return torch.tensor(255.0, device=device), MEAN.to(device), STD.to(device)
