"""Qwen-VL does what every model family must do."""

from pathlib import Path

import pytest
from models import check_family
from PIL import Image
from tiny import tiny_family

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.types import Conversation, ImageSource, Part, Turn


def row(name: str, *turns: tuple[tuple[Part, ...], str]) -> Conversation:
    parts = []
    for question, answer in turns:
        parts.append(Turn(role="user", parts=question))
        parts.append(Turn(role="assistant", parts=(answer,)))
    return Conversation(id=name, turns=tuple(parts))


RED, BLUE = (ImageSource(Image.new("RGB", (60, 40), color)) for color in ("red", "blue"))
ROWS = (
    row("one image", ((RED, "What colour is it?"), "red")),
    row("two images", ((RED, "and ", BLUE, "?"), "red and blue, in this order")),
    row("no image", (("1 + 1?",), "2")),
    row("two turns", ((BLUE, "What colour?"), "blue"), (("Sure?",), "yes, it is")),
)


@pytest.fixture(scope="module")
def family() -> QwenVLFamily:
    return tiny_family()


def test_lengths(family):
    check_family.check_lengths(family, ROWS)


def test_batches(family):
    check_family.check_batches(family, ROWS)


def test_training(family, tmp_path):
    check_family.check_training(family, ROWS, tmp_path)


def test_resuming(family, tmp_path):
    check_family.check_resume(family, ROWS, tmp_path)


def test_adapters(family):
    check_family.check_adapter(family, ROWS)


def test_answers(family):
    check_family.check_answers(family, ROWS)


def test_attention(family):
    check_family.check_attention(family, ROWS)


def test_boxes(family):
    check_family.check_boxes(family)


def test_vision_cache(family):
    check_family.check_vision_cache(family, ROWS)


def test_export(family, tmp_path):
    def load(folder: Path) -> QwenVLFamily:
        return QwenVLFamily(path=str(folder))

    check_family.check_export(family, tmp_path / "exported", load)
