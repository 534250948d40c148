"""The images of the embedded demo: one or two simple objects on a plain ground, and which split may show them."""

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
STEP_PX = 8  # objects begin and end on the grid of the tiny model's patches; off the grid it needs many times longer to learn
SIZES_PX = (24, 32)
PLACES = [
    (x, y, size)
    for size in SIZES_PX
    for x, y in product(range(0, SIDE_PX - size + 1, STEP_PX), repeat=2)
]  # 36 small, 25 large
RESERVED_CORNERS = 2  # corners per class that only `unseen_pairs` shows
BACKGROUNDS = (
    (244, 241, 232),
    (232, 240, 246),
    (236, 245, 234),
    (246, 236, 238),
    (240, 238, 247),
    (248, 244, 226),
)


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """An object of a class in the square of `size` pixels whose top-left corner is (x, y)."""

    x: int
    y: int
    size: int
    name: str

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1; the drawing touches all four sides."""
        return self.x, self.y, self.x + self.size, self.y + self.size


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing, or two of different classes whose columns do not overlap; left to right."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]

    def draw(self, scale: int = 1) -> Image.Image:
        """The image, RGB, `SIDE_PX * scale` a side; `scale` is for people, the data has 1."""
        image = Image.new("RGB", (SIDE_PX * scale, SIDE_PX * scale), self.background)
        for thing in self.things:
            sprite = draw_sprite(thing.name, thing.size * scale)
            image.paste(sprite, (thing.x * scale, thing.y * scale), sprite)
        return image


def scenes(
    split: Split, count: int, seed: int = 0, *, classes: Sequence[str] = CLASSES, pairs: float = 0.5
) -> Iterator[Scene]:
    """Scenes whose content belongs to `split`; a share of `pairs` has two things.

    No content (which class, where, how large) is in two splits, whatever the seeds. Within a split single things repeat, on other grounds.
    """
    rng = random.Random(f"{split} {seed} {pairs} {' '.join(classes)}")
    for _ in range(count):
        two = rng.random() < pairs
        while split_of(things := _draw_things(rng, classes, two)) != split:
            pass
        yield Scene(
            things, tuple(channel + rng.randint(-6, 6) for channel in rng.choice(BACKGROUNDS))
        )


def split_of(things: Sequence[Thing]) -> Split:
    """The only split that may show these things together: 85 % train, 5 % validation, 10 % test, by a hash that never changes."""
    if any((thing.x, thing.y) in reserved_corners(thing.name) for thing in things):
        return "unseen_pairs"
    percent = (
        _hash(
            " ".join(f"{thing.name} {thing.x} {thing.y} {thing.size}" for thing in sorted(things))
        )
        % 100
    )
    return "validation" if percent < 5 else "test" if percent < 15 else "train"


@cache
def reserved_corners(name: str) -> frozenset[tuple[int, int]]:
    """Top-left corners where training never shows the class; other classes do stand there."""
    corners = {(x, y) for x, y, _ in PLACES}
    return frozenset(
        sorted(corners, key=lambda corner: _hash(f"{name} {corner}"))[:RESERVED_CORNERS]
    )


def _draw_things(rng: random.Random, classes: Sequence[str], two: bool) -> tuple[Thing, ...]:
    names = rng.sample(classes, 2 if two else 1)
    while True:
        things = sorted(Thing(*rng.choice(PLACES), name) for name in names)
        if not two or things[0].x + things[0].size <= things[1].x:
            return tuple(things)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
