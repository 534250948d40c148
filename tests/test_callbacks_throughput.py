import re

import pytest
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.callbacks.throughput import Throughput

ROWS = [conversation(i, says="yes") for i in range(8)]  # two a batch; of three slots two are tokens and one is supervised


def test_rates_stand_in_the_proportions_of_the_batches(tmp_path):
    trainer(tmp_path, Throughput(), RunLog(), max_epochs=1, limit_val_batches=0).fit(ToyTask(), ToyData(ROWS))
    for record in read_log(tmp_path / "logging.jsonl"):
        assert record["samples_per_second"] > 0
        assert record["supervised_tokens_per_second"] == pytest.approx(record["samples_per_second"], rel=1e-5)
        assert record["tokens_per_second"] == pytest.approx(2 * record["samples_per_second"], rel=1e-5)
        assert record["padding_share"] == pytest.approx(1 / 3)


def test_the_time_of_validation_does_not_count(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))  # each reading ten seconds after the last
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", lambda: next(clock))
    trainer(tmp_path, Throughput(), RunLog(), max_epochs=2, limit_train_batches=2).fit(ToyTask(), ToyData(ROWS))
    rates = [record["samples_per_second"] for record in read_log(tmp_path / "logging.jsonl") if "loss" in record]
    assert rates == pytest.approx([0.2] * 4)


def test_the_window_forgets_slow_steps(tmp_path, monkeypatch):
    clock = iter([0, 100, 101, 102, 103])  # the first step took 100 seconds, the others one
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", lambda: next(clock))
    trainer(tmp_path, Throughput(window=2), RunLog(), max_epochs=1, limit_val_batches=0).fit(ToyTask(), ToyData(ROWS))
    rates = [record["samples_per_second"] for record in read_log(tmp_path / "logging.jsonl")]
    assert rates == pytest.approx([2 / 100, 4 / 101, 2, 2])


def test_a_test_and_a_prediction_end_with_their_rate(tmp_path, capsys):
    data = ToyData(test={"easy": ROWS[:3], "hard": ROWS[:2]})
    trainer(tmp_path, Throughput()).test(ToyTask(), data, verbose=False)
    trainer(tmp_path, Throughput()).predict(ToyTask(), data, return_predictions=False)
    printed = capsys.readouterr().out
    assert re.search(r"^test: 5 rows in \d+\.\d s, \d+\.\d pictures/s$", printed, re.MULTILINE)
    assert re.search(r"^predict: 5 rows in \d+\.\d s, \d+\.\d pictures/s$", printed, re.MULTILINE)
