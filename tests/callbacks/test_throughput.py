import re
from collections.abc import Iterator
from typing import ClassVar

import lightning
import pytest
import torch
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.callbacks.throughput import Throughput, peak_flops, trained_shares

ROWS = [
    conversation(i, says="yes") for i in range(8)
]  # two a batch; of three slots two are tokens and one is supervised


def clock_of(*, waits: float = 0, works: float, first: float | None = None):
    """A clock that is read when a batch is asked for and when it is there, once more at the first, and when its step is done."""

    def readings() -> Iterator[float]:
        now = 0.0
        yield from (now, now, now)
        yield (now := now + (works if first is None else first))
        while True:
            yield now
            yield (now := now + waits)
            yield (now := now + works)

    return readings().__next__


def test_rates_stand_in_the_proportions_of_the_batches(tmp_path):
    trainer(tmp_path, Throughput(), RunLog(), max_epochs=1, limit_val_batches=0).fit(
        ToyTask(), ToyData(ROWS)
    )
    for record in read_log(tmp_path / "logging.jsonl"):
        assert record["samples_per_second"] > 0
        assert record["supervised_tokens_per_second"] == pytest.approx(
            record["samples_per_second"], rel=1e-5
        )
        assert record["tokens_per_second"] == pytest.approx(
            2 * record["samples_per_second"], rel=1e-5
        )
        assert record["padding_share"] == pytest.approx(1 / 3)


def test_the_time_of_validation_does_not_count(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))  # each reading ten seconds after the last
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", lambda: next(clock))
    trainer(tmp_path, Throughput(), RunLog(), max_epochs=2, limit_train_batches=2).fit(
        ToyTask(), ToyData(ROWS)
    )
    records = [record for record in read_log(tmp_path / "logging.jsonl") if "loss" in record]
    assert [record["samples_per_second"] for record in records] == pytest.approx(
        [2 / 10, 4 / 40] * 2
    )


def test_the_time_of_a_checkpoint_does_not_count(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", lambda: next(clock))
    callbacks = (Throughput(), RunLog(), RunCheckpoint(every=2))
    trainer(tmp_path, *callbacks, max_epochs=1, limit_val_batches=0, enable_checkpointing=True).fit(
        ToyTask(), ToyData(ROWS)
    )
    rates = [record["samples_per_second"] for record in read_log(tmp_path / "logging.jsonl")]
    assert rates == pytest.approx([2 / 10, 4 / 40] * 2)


def test_waiting_is_the_time_until_a_batch_is_there(tmp_path, monkeypatch):
    """Each batch is waited for 1 second, but for the first, and worked on for 3."""
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", clock_of(waits=1, works=3))
    trainer(tmp_path, Throughput(window=2), RunLog(), max_epochs=1, limit_val_batches=0).fit(
        ToyTask(), ToyData(ROWS)
    )
    records = read_log(tmp_path / "logging.jsonl")
    assert [record["waiting_share"] for record in records] == pytest.approx(
        [0, 1 / 7, 2 / 8, 2 / 8]
    )
    assert [record["samples_per_second"] for record in records] == pytest.approx(
        [2 / 3, 4 / 7, 4 / 8, 4 / 8]
    )


def test_beside_another_profiler_waiting_is_not_known(tmp_path):
    one = trainer(
        tmp_path, Throughput(), RunLog(), max_steps=1, limit_val_batches=0, profiler="simple"
    )
    one.fit(ToyTask(), ToyData(ROWS))
    [record] = read_log(tmp_path / "logging.jsonl")
    assert record["waiting_share"] is None
    assert record["samples_per_second"] > 0
    assert "train_dataloader_next" in one.profiler.summary()


def test_compilations_are_those_of_the_training(tmp_path):
    def twice(x):
        return 2 * x

    class Compiling(ToyTask):
        """Its batches have another shape in the third step, for which the function is made again."""

        def training_step(self, batch, batch_idx):
            compiled(torch.ones(2 if batch_idx < 2 else 3))
            return super().training_step(batch, batch_idx)

    compiled = torch.compile(twice, backend="eager", dynamic=False)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # before it
    trainer(tmp_path, Throughput(), RunLog(), max_epochs=1, limit_val_batches=0).fit(
        Compiling(), ToyData(ROWS)
    )
    assert [record["compilations"] for record in read_log(tmp_path / "logging.jsonl")] == [
        1,
        1,
        2,
        2,
    ]


def test_what_is_logged_is_on_the_host(tmp_path):
    class Recorder(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values = {
                name: metric.value
                for name, metric in trainer._results.items()
                if name.startswith("on_train_batch_end.train/")
            }
            assert len(values) == 8
            assert all(value.device.type == "cpu" for value in values.values())

    class Elsewhere(ToyTask):
        device = torch.device("meta")  # what Lightning would put a plain number on

    trainer(tmp_path, Throughput(), Recorder(), max_epochs=1, limit_val_batches=0).fit(
        Elsewhere(), ToyData(ROWS)
    )


def test_the_window_forgets_slow_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "qwenvl_lit.callbacks.throughput.perf_counter", clock_of(works=1, first=100)
    )
    trainer(tmp_path, Throughput(window=2), RunLog(), max_epochs=1, limit_val_batches=0).fit(
        ToyTask(), ToyData(ROWS)
    )
    rates = [record["samples_per_second"] for record in read_log(tmp_path / "logging.jsonl")]
    assert rates == pytest.approx([2 / 100, 4 / 101, 2, 2])


def test_a_test_and_a_prediction_end_with_their_rate(tmp_path, capsys):
    data = ToyData(test={"easy": ROWS[:3], "hard": ROWS[:2]})
    trainer(tmp_path, Throughput()).test(ToyTask(), data, verbose=False)
    trainer(tmp_path, Throughput()).predict(ToyTask(), data, return_predictions=False)
    printed = capsys.readouterr().out
    assert re.search(r"^test: 5 rows in \d+\.\d s, \d+\.\d images/s$", printed, re.MULTILINE)
    assert re.search(r"^predict: 5 rows in \d+\.\d s, \d+\.\d images/s$", printed, re.MULTILINE)


def test_operations_are_compared_with_the_peak_of_the_device(tmp_path, monkeypatch):
    """A second a batch of 2e12 operations, on a device that could do 8e12."""

    class Family:
        components: ClassVar = {"all": "weight"}

        def flops(self, batch, trained):
            return 1e12 * len(batch.conversations)

    class Working(ToyTask):
        def __init__(self):
            super().__init__()
            self.family = Family()
            self.model = torch.nn.Linear(1, 1)

    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", clock_of(works=1))
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.peak_flops", lambda device: 8e12)
    trainer(tmp_path, Throughput(), RunLog(), max_epochs=1, limit_val_batches=0).fit(
        Working(), ToyData(ROWS)
    )
    records = read_log(tmp_path / "logging.jsonl")
    assert [record["mfu"] for record in records] == pytest.approx([0.25] * 4)
    assert [record["tflop_per_second"] for record in records] == pytest.approx([2.0] * 4)


def test_a_device_without_a_known_peak_has_no_share_of_it(tmp_path):
    trainer(tmp_path, Throughput(), RunLog(), max_steps=1, limit_val_batches=0).fit(
        ToyTask(), ToyData(ROWS)
    )
    assert read_log(tmp_path / "logging.jsonl")[0]["mfu"] is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
    ],
)
def test_peaks_are_those_of_the_data_sheets(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda:0")) == peak


def test_the_trained_share_of_a_part_leaves_out_the_part_inside_it():
    model = torch.nn.ModuleDict(
        {
            "tower": torch.nn.ModuleDict(
                {"block": torch.nn.Linear(3, 4), "pool": torch.nn.Linear(2, 4)}
            )
        }
    )
    model["tower"]["pool"].requires_grad_(False)
    model["tower"]["block"].bias.requires_grad_(False)
    assert trained_shares(
        model, {"vision": "tower", "resampler": "tower.pool", "head": "head"}
    ) == {
        "vision": 12 / 16,
        "resampler": 0,
        "head": 0,
    }
