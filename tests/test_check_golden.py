"""The network gives the values of the original code; `test_check_golden_text.py` does the same for tokens, prompts and boxes."""

import runpy
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "check_golden.py"))


@pytest.mark.parametrize("pattern", SCRIPT["CHECKS"])
def test_the_network_gives_the_values_of_the_original(pattern):
    found = [result for _, result in SCRIPT["results"](GOLDEN, pattern)]
    assert found
    assert [result for result in found if not result.passed] == []


def test_a_nan_is_a_miss():
    assert not SCRIPT["Result"]("case", float("nan"), 1.0).passed
