"""The phases that `bench_startup.py` measures."""

import importlib
import json
import os
import statistics
from operator import attrgetter

import pytest
from bench_startup import MOMENTS, PHASES, Case, Marks, cases, measure_command, medians

TARGETS = set().union(*(phases.values() for phases in (*PHASES.values(), *MOMENTS.values())))


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_is_measured_exists(target):
    module, _, path = target.partition(":")
    assert callable(attrgetter(path)(importlib.import_module(module)))


def test_every_command_with_phases_is_measured():
    assert {case.command for case in cases([]).values()} == {*PHASES}


def test_medians_leave_out_the_first_run():
    results = iter([100.0, 1.0, 3.0, 2.0])
    measured = medians(lambda: {"end": next(results)}, repeats=3)
    assert measured["end"] == statistics.median([1.0, 3.0, 2.0])
    assert measured["cpu"] == 0


def test_only_the_first_call_of_a_function_is_a_mark(monkeypatch):
    reading, writing = os.pipe()
    marks = Marks(writing)
    monkeypatch.setattr(statistics, "mean", statistics.mean)  # undone after the test
    marks.wrap("duration", "mean", "statistics:mean")
    assert [statistics.mean([1, 3]), statistics.mean([5])] == [2, 5]
    marks.moment("done")
    marks.close()
    with os.fdopen(reading) as stream:
        [[kind, name, seconds], [_, done, _]] = map(json.loads, stream)
    assert (kind, name, done) == ("duration", "mean", "done")
    assert 0 <= seconds < 1


def test_a_command_that_fails_is_an_error_with_its_message(tmp_path):
    with pytest.raises(RuntimeError, match=r"did you mean trainer\.max_steps"):
        measure_command(Case("train", ("trainer.max_setps=2",)), tmp_path)
