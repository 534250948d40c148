"""Rows to measure training with: JPEG files on disk, and lengths that are known to the token."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.types import Conversation, ImageSource, Part, Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of rows of one length, with an image each, and of mixed ones."""

    even: int
    learned: int  # of an even row
    mixed: tuple[int, int]
    learned_of_mixed: int
    most_images: int  # of a mixed row


FULL = Lengths(
    even=320, learned=16, mixed=(32, 1500), learned_of_mixed=12, most_images=4
)  # a chat row without a question has 20 + 12
SMALL = Lengths(even=64, learned=16, mixed=(32, 200), learned_of_mixed=8, most_images=4)


def write_images(folder: Path, count: int) -> list[str]:
    """Names of `count` JPEG files of 640 x 480: soft shapes and grain, as large on disk as a camera's at quality 90 (about 110 kB)."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> str:
        draw = np.random.default_rng(number)
        soft = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grainy = np.asarray(soft) + draw.normal(0, 8, (480, 640, 1))
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(
            folder / f"{number}.jpg", quality=90
        )
        return f"{number}.jpg"

    with ThreadPoolExecutor() as threads:
        return list(threads.map(write, range(count)))


def write_even(
    file: Path, images: list[str], rows: int, lengths: Lengths, processor: Processor
) -> None:
    """`rows` rows of the same length; images come again when all have been used."""
    empty = _measured(processor, 1, lengths.learned)
    _write(
        file,
        [([images[i % len(images)]], lengths.even - empty, lengths.learned) for i in range(rows)],
    )
    assert _measured(processor, 1, lengths.learned, lengths.even - empty) == lengths.even


def write_mixed(
    file: Path, images: list[str], rows: int, lengths: Lengths, processor: Processor
) -> int:
    """`rows` rows with up to `most_images` images and of any length that these leave, all equally often; returns their tokens."""
    draw, (shortest, longest), total = np.random.default_rng(0), lengths.mixed, 0
    empty = [
        _measured(processor, count, lengths.learned_of_mixed)
        for count in range(lengths.most_images + 1)
    ]
    made = []
    for _ in range(rows):
        count = int(draw.integers(len(empty)))
        tokens = int(draw.integers(max(shortest, empty[count]), longest + 1))
        made.append(
            (draw.choice(images, count).tolist(), tokens - empty[count], lengths.learned_of_mixed)
        )
        total += tokens
    _write(file, made)
    return total


def _write(file: Path, rows: list[tuple[list[str], int, int]]) -> None:
    """Rows of (images, tokens of the question, learned ones): a digit is a token in every vocabulary, and an end mark is learned too."""
    with file.open("w") as lines:
        for names, asked, learned in rows:
            images = "".join(
                f"Picture {place}: <img>{name}</img>\n" for place, name in enumerate(names, start=1)
            )
            lines.write(
                json.dumps({"query": images + "1" * asked, "response": "1" * (learned - 1)}) + "\n"
            )


def _measured(processor: Processor, images: int, learned: int, asked: int = 0) -> int:
    """Tokens of a row of `_write`."""
    parts: list[Part] = []
    for place in range(1, images + 1):
        parts += ["\n" * (place > 1) + f"Picture {place}: ", ImageSource(Image.new("RGB", (8, 8)))]
    asks = Turn(role="user", parts=(*parts, "\n" * bool(images) + "1" * asked))
    row = Conversation(id="row", turns=(asks, Turn(role="assistant", parts=("1" * (learned - 1),))))
    tokens, found = processor.length(row)
    assert found == learned, (found, learned)
    return tokens
