"""Two processes write the same files as one."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy
from toy_task import ToyData, ToyTask, conversation, trainer
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit.callbacks.boxes import BoxDrawer
from qwenvl_lit.callbacks.curves import Curves
from qwenvl_lit.callbacks.predictions import PredictionWriter
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.callbacks.samples import SampleVisualiser
from qwenvl_lit.callbacks.throughput import Throughput


def train_and_test(folder: Path, **options) -> None:
    """Five test rows do not divide by two, and rank 1 has no row of the set of one."""
    data = ToyData(
        rows=[conversation(i, says="yes") for i in range(8)],
        test={
            "five": [conversation(i, says="yes" if i < 2 else "no") for i in range(5)],
            "one": [conversation(0, says="yes")],
        },
    )
    fits = (Throughput(), RunLog(), SampleVisualiser(count=2), Curves())
    tests = (Throughput(), RunLog(), PredictionWriter(), BoxDrawer(1))
    trainer(folder / "fit", *fits, max_epochs=1, **deepcopy(options)).fit(ToyTask(), data)
    trainer(folder / "test", *tests, **deepcopy(options)).test(ToyTask(), data, verbose=False)


def train_and_test_as_rank(rank: int, folder: Path) -> None:
    train_and_test(folder, strategy=DDPStrategy(**GLOO), devices=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of one process and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train_and_test(one)
    on_two_ranks(train_and_test_as_rank, two)
    return one, two


def test_the_same_files_are_written(runs):
    one, two = (
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in runs
    )
    # Twice the batch: half as many steps.
    assert {name.replace("000004", "000002") for name in one} == two
    assert {
        "test/predictions.jsonl",
        "test/metrics.json",
        "fit/logging.jsonl",
        "fit/curves/loss.png",
        "fit/samples/step_000002.png",
    } < two


def test_predictions_and_scores_are_equal(runs):
    one, two = runs
    for name in ("predictions.jsonl", "metrics.json"):
        assert (one / "test" / name).read_text() == (two / "test" / name).read_text()
    assert json.loads((two / "test/metrics.json").read_text())["test"] == {
        "five/exact_match": pytest.approx(0.4),
        "five/rows": 5,
        "one/exact_match": 1,
        "one/rows": 1,
    }


def test_the_log_has_each_step_once(runs):
    records = read_log(runs[1] / "fit/logging.jsonl")
    assert [record["step"] for record in records] == [1, 2, 2]
    assert records[1]["padding_share"] == pytest.approx(1 / 3)
