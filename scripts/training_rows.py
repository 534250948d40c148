"""Rows for measuring training: JPEG files on disk, and exact lengths in tokens."""

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
    """Lengths in tokens: of even rows, which have one image each, and of mixed ones."""

    even: int
    supervised: int  # of an even row
    mixed: tuple[int, int]
    supervised_mixed: int  # of a mixed row
    most_images: int  # of a mixed row


# A chat row without a question has 20 + 12 tokens
FULL = Lengths(even=320, supervised=16, mixed=(32, 1500), supervised_mixed=12, most_images=4)
# An image of 640 x 480 has 391 tokens in Qwen2.5-VL and 300 in Qwen3-VL
OTHER_MODELS = Lengths(
    even=512, supervised=16, mixed=(32, 2048), supervised_mixed=12, most_images=4
)
SMALL = Lengths(even=64, supervised=16, mixed=(32, 200), supervised_mixed=8, most_images=4)


def write_images(folder: Path, count: int) -> list[str]:
    """Writes `count` JPEG files of 640 x 480 and returns their names.

    Soft shapes and grain make them as large as a camera's at quality 90, about 110 kB.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> str:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        soft = coarse.resize((640, 480), Image.Resampling.BICUBIC)
        grainy = np.asarray(soft) + rng.normal(0, 8, (480, 640, 1))
        image = Image.fromarray(grainy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=90)
        return f"{number}.jpg"

    with ThreadPoolExecutor() as threads:
        return list(threads.map(write, range(count)))


def write_even(
    file: Path, images: list[str], rows: int, lengths: Lengths, processor: Processor
) -> None:
    """Writes `rows` rows of the same length; images repeat once all have been used."""
    question = lengths.even - _length(processor, 1, lengths.supervised)
    with file.open("w") as lines:
        for index in range(rows):
            image = images[index % len(images)]
            lines.write(_row([image], question, lengths.supervised))
    assert _length(processor, 1, lengths.supervised, question) == lengths.even


def write_mixed(
    file: Path, images: list[str], rows: int, lengths: Lengths, processor: Processor
) -> int:
    """Writes `rows` rows with 0 to `most_images` images; returns their number of tokens.

    All lengths between the limits that the images of a row allow are equally likely.
    """
    rng, (shortest, longest), total = np.random.default_rng(0), lengths.mixed, 0
    supervised = lengths.supervised_mixed
    counts = range(lengths.most_images + 1)
    without_question = [_length(processor, count, supervised) for count in counts]
    with file.open("w") as lines:
        for _ in range(rows):
            count = int(rng.integers(len(without_question)))
            empty = without_question[count]
            tokens = int(rng.integers(max(shortest, empty), longest + 1))
            chosen = rng.choice(images, count).tolist()
            lines.write(_row(chosen, tokens - empty, supervised))
            total += tokens
    return total


def _row(images: list[str], question: int, supervised: int) -> str:
    """A line of a file, with `question` tokens in the question and `supervised` in the answer.

    A digit is one token in every vocabulary; the end-of-turn token is supervised too.
    """
    query = ""
    for number, name in enumerate(images, start=1):
        query += f"Picture {number}: <img>{name}</img>\n"
    row = {"query": query + "1" * question, "response": "1" * (supervised - 1)}
    return json.dumps(row) + "\n"


def _length(processor: Processor, images: int, supervised: int, question: int = 0) -> int:
    """Tokens of a row of `_row`."""
    parts: list[Part] = []
    for number in range(1, images + 1):
        newline = "\n" if number > 1 else ""
        parts += [f"{newline}Picture {number}: ", ImageSource(Image.new("RGB", (640, 480)))]
    parts.append("\n" * bool(images) + "1" * question)
    user = Turn(role="user", parts=tuple(parts))
    assistant = Turn(role="assistant", parts=("1" * (supervised - 1),))
    length, counted, _ = processor.length(Conversation(id="row", turns=(user, assistant)))
    assert counted == supervised, (counted, supervised)
    return length
