"""Preprocesses images for the vision tower, bit-exactly as the original Qwen-VL code does."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

# CLIP's mean and standard deviation of the channels R, G and B.
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """Returns the image as (3, size, size) float32, normalized as for CLIP.

    The alpha channel is dropped, the aspect ratio is not preserved, and EXIF rotation is ignored.
    """
    return normalize_pixels(resize_image(image, size)[None])[0]


def resize_image(image: Image.Image, size: int) -> torch.Tensor:
    """Returns the resized image before normalization, (size, size, 3) uint8.

    Data workers pass images in this form, which takes a quarter of the bytes of float32 pixels.
    """
    square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square))


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Converts (N, size, size, 3) uint8 to normalized pixels (N, 3, size, size) float32.

    The result is bit-identical on all devices.
    """
    values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    scale, mean, std = _constants(pixels.device)
    return values.div_(scale).sub_(mean).div_(std)


@lru_cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The divisors are tensors. CUDA would multiply by the inverse of a Python number, which rounds
    # differently.
    return torch.tensor(255.0, device=device), MEAN.to(device), STD.to(device)
