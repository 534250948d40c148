"""Qwen2.5-VL and Qwen3-VL do what every model family must do."""

from dataclasses import replace
from pathlib import Path

import pytest
from models import check_family
from tiny_qwen3_vl import KINDS, image, talk, tiny_qwen3_vl

from qwenvl_lit.models.qwen3_vl.family import Qwen3VLFamily

RED, BLUE = image(60, 40), image(100, 150, "blue")
QUESTIONS = (
    talk((RED, "What colour is it?"), "red"),
    talk((RED, "and ", BLUE, "?"), "red and blue, in this order"),
    talk("1 + 1?", "2"),
    talk((BLUE, "What colour?"), "blue", "Sure?", "yes, it is"),
)
ROWS = tuple(replace(row, id=str(number)) for number, row in enumerate(QUESTIONS))


@pytest.fixture(scope="module", params=KINDS)
def family(request) -> Qwen3VLFamily:
    return tiny_qwen3_vl(request.param)


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
    # Boxes of images that are made smaller are less exact.
    large = tiny_qwen3_vl(family.config.model_type, max_pixels=10**7)
    check_family.check_boxes(large)


def test_vision_cache(family):
    check_family.check_vision_cache(family, ROWS)


def test_export(family, tmp_path):
    def load(folder: Path) -> Qwen3VLFamily:
        return Qwen3VLFamily(path=str(folder))

    check_family.check_export(family, tmp_path / "exported", load)
