"""Memory and open files stay level while a process works for long."""

from __future__ import annotations

import pytest
from faults.soak import WARM_UP, Samples, measured, slope
from faults.tally import Tally, sizes, tallied

MOST_MB_PER_THOUSAND = 1.0


def describe(tally: Tally, samples: Samples) -> None:
    """Adds the measured values to the record."""
    tally.measured["mb_at_start_and_end"] = [round(samples[0][1], 1), round(samples[-1][1], 1)]
    tally.measured["mb_per_1000_after_warm_up"] = round(slope(samples), 3)
    tally.measured["open_files_at_start_and_end"] = [samples[0][2], samples[-1][2]]


def assert_level(samples: Samples) -> None:
    growth = slope(samples)
    assert growth < MOST_MB_PER_THOUSAND, f"memory grows by {growth:.2f} MB per 1,000"
    assert_same_files(samples)


def assert_same_files(samples: Samples) -> None:
    """The second half has no more open files than the first one after the warm-up had."""
    level = [files for *_, files in samples[int(len(samples) * WARM_UP) :]]
    half = len(level) // 2
    assert max(level[half:]) <= max(level[:half]), f"open files grow: {level}"


@sizes(short=None, full={"train": 3000, "predict": 5000, "chat that forgets": 200})
@pytest.mark.parametrize("work", ["train", "predict", "chat that forgets"])
def test_memory_is_level_after_the_warm_up(work, size):
    with tallied("long work", f"{work}, {size[work]:,}") as tally, tally.attempt(work):
        samples = measured(work, size[work])
        describe(tally, samples)
        assert_level(samples)


@sizes(short=None, full=200)
def test_memory_of_a_chat_grows_with_its_history_and_not_with_its_turns(size):
    """A second chat in the same process needs no more than the first one."""
    with tallied("long work", f"chat twice, {size} turns each") as tally, tally.attempt("chat"):
        samples = measured("chat twice", size)
        describe(tally, samples)
        half = len(samples) // 2
        first = max(mb for _, mb, _ in samples[:half])
        second = max(mb for _, mb, _ in samples[half:])
        tally.measured["most_mb_of_first_and_second_chat"] = [round(first, 1), round(second, 1)]
        assert second < first + 5, f"the second chat needs {second - first:.1f} MB more"
        assert_same_files(samples)


@sizes(short=1, full=None)
def test_the_samples_are_of_the_work(size):
    """The short form: few answers, without a limit on memory, which is not level yet."""
    samples = measured("predict", 100)
    assert samples[-1][0] == 100
    assert_same_files(samples)


def test_the_slope_is_per_thousand_units():
    rising = [(done, 400 + done / 500, 6) for done in range(0, 1000, 10)]
    assert slope(rising) == pytest.approx(2)
