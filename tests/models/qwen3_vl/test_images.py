import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_qwen3_vl import image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwenvl_lit.models.qwen3_vl.config import IMAGES
from qwenvl_lit.models.qwen3_vl.images import ImageProcessor, normalize_patches
from qwenvl_lit.types import BadImage, ImageSource

PATCHES = {"qwen2_5_vl": 14, "qwen3_vl": 16}


def processor(kind: str, **limits) -> ImageProcessor:
    settings = {**IMAGES[kind], **limits}
    return ImageProcessor(
        patch_size=PATCHES[kind],
        merge_size=2,
        min_pixels=settings["min_pixels"],
        max_pixels=settings["max_pixels"],
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )


def noise(generator: random.Random) -> Image.Image:
    width, height = generator.randint(10, 500), generator.randint(10, 500)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(generator.choice(("RGB", "L", "RGBA", "P", "CMYK")))


@pytest.mark.parametrize("kind", PATCHES)
def test_pixels_are_those_of_the_published_image_processor(kind):
    generator = random.Random(0)
    for limits in ({}, {"min_pixels": 784, "max_pixels": 20_000}):
        ours = processor(kind, **limits)
        published = Qwen2VLImageProcessorPil(
            patch_size=ours.patch_size,
            min_pixels=ours.min_pixels,
            max_pixels=ours.max_pixels,
            image_mean=ours.mean,
            image_std=ours.std,
        )
        for _ in range(12):
            picture = noise(generator)
            expected = published([picture], return_tensors="pt")
            source = ImageSource(picture)
            patches = ours.patches(source)
            assert patches.dtype == torch.uint8
            assert [[1, *ours.grid(source)]] == expected["image_grid_thw"].tolist()
            normalized = normalize_patches(patches, ours.mean, ours.std)
            assert torch.equal(normalized, expected["pixel_values"])


def test_sizes_are_those_of_the_published_rule():
    ours = processor("qwen2_5_vl", max_pixels=1003520)
    assert ours.resized(image(640, 427)) == (644, 420)
    assert ours.tokens(image(640, 427)) == 23 * 15
    assert ours.resized(image(4000, 3000)) == (1148, 840)
    assert ours.resized(image(8, 8)) == (56, 56)
    assert processor("qwen3_vl").resized(image(100, 50)) == (384, 192)


def test_sizes_are_known_from_the_header_alone(tmp_path):
    file = tmp_path / "a.png"
    image(300, 200).open().save(file)
    file.write_bytes(file.read_bytes()[:60])  # no pixels
    assert processor("qwen3_vl").tokens(ImageSource(file)) == 10 * 7


@pytest.mark.parametrize("size", [(1, 201), (201, 1)])
def test_an_image_that_is_too_narrow_is_refused(size):
    with pytest.raises(BadImage, match=r"has \d+ x \d+ px; its longer side may be at most 200"):
        processor("qwen3_vl").tokens(image(*size))
    assert processor("qwen3_vl").tokens(image(200, 1)) > 0


def test_limits_in_the_wrong_order_are_an_error():
    with pytest.raises(ValueError, match=r"model\.min_pixels=65536 is above model\.max_pixels=900"):
        processor("qwen3_vl", max_pixels=900)
