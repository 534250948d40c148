import re
from typing import ClassVar

import pytest
import torch
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.checkpoint import Checkpoints
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.callbacks.throughput import Throughput, peak_flops, trained_shares

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
    records = [record for record in read_log(tmp_path / "logging.jsonl") if "loss" in record]
    assert [record["samples_per_second"] for record in records] == pytest.approx([2 / 10, 4 / 30] * 2)
    assert [record["waiting_share"] for record in records] == pytest.approx([0, 1 / 3] * 2)  # between the batches


def test_the_time_of_a_checkpoint_does_not_count(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", lambda: next(clock))
    callbacks = (Throughput(), RunLog(), Checkpoints(every=2))
    trainer(tmp_path, *callbacks, max_epochs=1, limit_val_batches=0, enable_checkpointing=True).fit(ToyTask(), ToyData(ROWS))
    rates = [record["samples_per_second"] for record in read_log(tmp_path / "logging.jsonl")]
    assert rates == pytest.approx([2 / 10, 4 / 30] * 2)


def test_the_window_forgets_slow_steps(tmp_path, monkeypatch):
    clock = iter([0, 100, 100, 101, 101, 102, 102, 103])  # the first step took 100 seconds, the others one; loading none
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


def test_operations_are_compared_with_the_peak_of_the_device(tmp_path, monkeypatch):
    """A second a batch of 2e12 operations, on a device that could do 8e12."""

    class Family:
        parts: ClassVar = {"all": "weight"}

        def flops(self, batch, trained):
            return torch.tensor(1e12 * len(batch.conversations), dtype=torch.float64)

    class Working(ToyTask):
        def __init__(self):
            super().__init__()
            self.family = Family()
            self.model = torch.nn.Linear(1, 1)

    clock = iter([0, 1, 1, 2, 2, 3, 3, 4])
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", lambda: next(clock))
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.peak_flops", lambda device: 8e12)
    trainer(tmp_path, Throughput(), RunLog(), max_epochs=1, limit_val_batches=0).fit(Working(), ToyData(ROWS))
    assert [record["mfu"] for record in read_log(tmp_path / "logging.jsonl")] == pytest.approx([0.25] * 4)


def test_a_device_without_a_known_peak_has_no_share_of_it(tmp_path):
    trainer(tmp_path, Throughput(), RunLog(), max_steps=1, limit_val_batches=0).fit(ToyTask(), ToyData(ROWS))
    assert read_log(tmp_path / "logging.jsonl")[0]["mfu"] is None


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12)]
)
def test_peaks_are_those_of_the_data_sheets(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda:0")) == peak


def test_the_trained_share_of_a_part_leaves_out_the_part_inside_it():
    model = torch.nn.ModuleDict({"tower": torch.nn.ModuleDict({"block": torch.nn.Linear(3, 4), "pool": torch.nn.Linear(2, 4)})})
    model["tower"]["pool"].requires_grad_(False)
    model["tower"]["block"].bias.requires_grad_(False)
    assert trained_shares(model, {"vision": "tower", "resampler": "tower.pool", "head": "head"}) == {
        "vision": 12 / 16,
        "resampler": 0,
        "head": 0,
    }
