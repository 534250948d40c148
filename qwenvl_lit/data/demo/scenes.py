"""Generates the scenes of the demo dataset: one or two objects on a plain background."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

from PIL import Image

from qwenvl_lit.data.demo.sprites import CLASSES, draw_sprite

Split = Literal["train", "validation", "test", "unseen_pairs"]

SIDE_PX = 64
# Objects are aligned to the patches of the tiny model. Training on unaligned objects would take
# many times longer.
STEP_PX = 8
SIZES_PX = (24, 32)
RESERVED_CORNERS = 2  # positions per class that occur only in the split `unseen_pairs`
BACKGROUNDS = (
    (244, 241, 232),
    (232, 240, 246),
    (236, 245, 234),
    (246, 236, 238),
    (240, 238, 247),
    (248, 244, 226),
)


def _placements() -> Iterator[tuple[int, int, int]]:
    for size in SIZES_PX:
        for x, y in product(range(0, SIDE_PX - size + 1, STEP_PX), repeat=2):
            yield x, y, size


PLACEMENTS = list(_placements())  # (x, y, size): 36 for small and 25 for large objects


@dataclass(frozen=True, slots=True, order=True)
class SceneObject:
    """An object in the square of `size` pixels a side whose top-left corner is (x, y)."""

    x: int
    y: int
    size: int
    name: str  # of the class

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        """The box (x0, y0, x1, y1) around the object, which touches all four sides."""
        return self.x, self.y, self.x + self.size, self.y + self.size


@dataclass(frozen=True, slots=True)
class Scene:
    """One object, or two objects of different classes from left to right without overlap."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]

    def draw(self, scale: int = 1) -> Image.Image:
        """Returns a square RGB image with a side of `SIDE_PX * scale`.

        Args:
            scale: 1 for images of the dataset, or larger for images that people look at.
        """
        image = Image.new("RGB", (SIDE_PX * scale, SIDE_PX * scale), self.background)
        for obj in self.objects:
            sprite = draw_sprite(obj.name, obj.size * scale)
            image.paste(sprite, (obj.x * scale, obj.y * scale), sprite)
        return image


def scenes(
    split: Split, count: int, seed: int = 0, *, classes: Sequence[str] = CLASSES, pairs: float = 0.5
) -> Iterator[Scene]:
    """Yields random scenes that belong to `split`.

    With any seeds, the same objects at the same positions never occur in two splits. Within a split
    they may occur several times, on different backgrounds.

    Args:
        pairs: the probability that a scene has two objects.
    """
    rng = random.Random(f"{split} {seed} {pairs} {' '.join(classes)}")
    for _ in range(count):
        number = 2 if rng.random() < pairs else 1
        objects = _draw_objects(rng, classes, number)
        while split_of(objects) != split:
            objects = _draw_objects(rng, classes, number)
        background = rng.choice(BACKGROUNDS)
        yield Scene(objects, tuple(channel + rng.randint(-6, 6) for channel in background))


def split_of(objects: Sequence[SceneObject]) -> Split:
    """Returns the split to which a scene with these objects belongs.

    Scenes with a class in one of its reserved corners belong to `unseen_pairs`. Of the others, a
    fixed hash assigns 85 % to train, 5 % to validation and 10 % to test.
    """
    if any((obj.x, obj.y) in reserved_corners(obj.name) for obj in objects):
        return "unseen_pairs"
    descriptions = [f"{obj.name} {obj.x} {obj.y} {obj.size}" for obj in sorted(objects)]
    percent = _hash(" ".join(descriptions)) % 100
    if percent < 5:
        return "validation"
    return "test" if percent < 15 else "train"


@cache
def reserved_corners(name: str) -> frozenset[tuple[int, int]]:
    """Returns the positions at which a class occurs only in the split `unseen_pairs`."""
    corners = {(x, y) for x, y, _ in PLACEMENTS}
    by_hash = sorted(corners, key=lambda corner: _hash(f"{name} {corner}"))
    return frozenset(by_hash[:RESERVED_CORNERS])


def _draw_objects(
    rng: random.Random, classes: Sequence[str], count: int
) -> tuple[SceneObject, ...]:
    names = rng.sample(classes, count)
    while True:
        objects = sorted(SceneObject(*rng.choice(PLACEMENTS), name) for name in names)
        if count == 1 or objects[0].x + objects[0].size <= objects[1].x:
            return tuple(objects)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
