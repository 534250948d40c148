"""Visual contrastive decoding (arXiv 2311.16922): prefers what a noised image makes less likely.

python examples/contrastive_decoding.py Qwen/Qwen-VL-Chat dog.jpg "Is there a cat in the image?"
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwenvl_lit import QwenVL


def noised(image: Image.Image, step: int = 500, seed: int = 0) -> Image.Image:
    """Returns the image after some of 1,000 diffusion steps, with the noise of the paper's code."""
    rates = torch.linspace(-6, 6, 1000).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = (1 - rates).cumprod(0)[step].item()
    pixels = (np.asarray(image) / 255 - 0.45) / 0.27  # about as the vision tower gets them
    noise = np.random.default_rng(seed).standard_normal(pixels.shape)
    mixed = math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise
    return Image.fromarray(((mixed * 0.27 + 0.45).clip(0, 1) * 255).astype(np.uint8))


class Contrast:
    """A logits processor for two rows: the question about an image, and about its noised copy.

    Both rows get the same scores and so, with greedy decoding, the same answer.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.1):  # as in the paper
        self.alpha = alpha
        self.beta = beta

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        image, noise = scores
        contrast = (1 + self.alpha) * image - self.alpha * noise
        implausible = image < image.max() + math.log(self.beta)
        return contrast.masked_fill(implausible, -torch.inf).expand_as(scores)


def answer(model: QwenVL, image: Image.Image, question: str, **settings: Any) -> str:
    image = image.convert("RGB")
    image.thumbnail((448, 448))  # scaling a noised image later would average its noise
    rows = [[image, question], [noised(image), question]]
    return model.generate(rows, batch_size=2, logits_processor=Contrast(), **settings)[0]


if __name__ == "__main__":
    source, file, asked = sys.argv[1:]
    print(answer(QwenVL.load(source), Image.open(file), asked))
