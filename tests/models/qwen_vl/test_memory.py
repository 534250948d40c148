"""The memory of an evaluation, against what was measured on a GPU."""

import json
from pathlib import Path

import pytest

from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.memory import answering_bytes, loss_bytes

RECORD = Path(__file__).parents[3] / "benchmarks" / "generate.json"
GIB = 2**30
BFLOAT16 = 2  # bytes


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_the_memory_of_answers_is_estimated_within_a_gib_of_the_measured_peak(rows):
    record = json.loads(RECORD.read_text())
    peaks = {}
    for measured in record["decoding"]:
        if not measured["compiled"]:
            peaks[measured["rows"]] = measured["peak_gib"] * GIB
    weights = record["model"]["parameters"] * BFLOAT16
    sizes = {"tokens": 300, "images": 1, "new_tokens": 64, "at_once": False}
    estimate = answering_bytes(QwenVLConfig(visual=QWEN_VL_VISUAL), BFLOAT16, rows=rows, **sizes)
    assert 0 <= weights + estimate - peaks[rows] < GIB


def test_the_cache_has_half_a_mebibyte_per_token_and_row():
    def size(new_tokens: int) -> int:
        sizes = {"rows": 64, "tokens": 256, "images": 0, "at_once": False}
        return answering_bytes(
            QwenVLConfig(visual=QWEN_VL_VISUAL), BFLOAT16, **sizes, new_tokens=new_tokens
        )

    # 64 rows have slots for a multiple of 64 tokens
    assert size(512) - size(256) == 64 * 256 * 2**19
    assert size(257) == size(320)


def test_prompts_are_read_in_passes_unless_transformers_reads_them():
    sizes = {"rows": 128, "tokens": 1024, "images": 0, "new_tokens": 64}
    in_passes = answering_bytes(
        QwenVLConfig(visual=QWEN_VL_VISUAL), BFLOAT16, **sizes, at_once=False
    )
    at_once = answering_bytes(QwenVLConfig(visual=QWEN_VL_VISUAL), BFLOAT16, **sizes, at_once=True)
    assert at_once - in_passes > 20 * GIB


def test_the_memory_of_a_loss_grows_with_rows_tokens_images_and_targets():
    sizes = {"rows": 16, "tokens": 320, "images": 1, "supervised": 16}
    base = loss_bytes(QwenVLConfig(visual=QWEN_VL_VISUAL), BFLOAT16, **sizes)
    assert 1 < base / GIB < 2.5
    for name in sizes:
        assert (
            loss_bytes(
                QwenVLConfig(visual=QWEN_VL_VISUAL), BFLOAT16, **{**sizes, name: 8 * sizes[name]}
            )
            > base
        )
