import re
from collections.abc import Iterator
from typing import ClassVar

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.profilers import SimpleProfiler
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit import build
from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.callbacks.run_log import RunLog, read_log
from qwenvl_lit.callbacks.throughput import (
    PEAKS,
    DataWaitProfiler,
    Throughput,
    peak_flops,
    trained_fractions,
)
from qwenvl_lit.runs.run import config_folder

# Two rows are a batch; of the three slots of a row two are tokens, and one of them is supervised.
ROWS = [conversation(i, says="yes") for i in range(8)]


def clock_of(*, waits: float = 0, works: float, first: float | None = None):
    """Returns a clock for a run whose batches take `waits` seconds to load and `works` to train on.

    It is read when a batch is requested, when it has arrived, and when its step is done; at the
    first batch it is read once more before the step. `first` replaces `works` for the first batch.
    """

    def readings() -> Iterator[float]:
        now = 0.0
        yield from (now, now, now)
        now += works if first is None else first
        yield now
        while True:
            yield now
            now += waits
            yield now
            now += works
            yield now

    return readings().__next__


def train(folder, *callbacks, module=None, **options) -> list[dict]:
    """Trains one epoch without validation, and returns the records of its log."""
    defaults = {"max_epochs": 1, "limit_val_batches": 0, "profiler": DataWaitProfiler()}
    made = trainer(folder, *callbacks, RunLog(), **{**defaults, **options})
    made.fit(module or ToyTask(), ToyData(ROWS))
    return [record for record in read_log(folder / "logging.jsonl") if "loss" in record]


def set_clock(monkeypatch, clock) -> None:
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.perf_counter", clock)


def test_rates_are_in_the_proportions_of_the_batches(tmp_path):
    for record in train(tmp_path, Throughput()):
        samples = record["samples_per_second"]
        assert samples > 0
        assert record["supervised_tokens_per_second"] == pytest.approx(samples, rel=1e-5)
        assert record["tokens_per_second"] == pytest.approx(2 * samples, rel=1e-5)
        assert record["padding_share"] == pytest.approx(1 / 3)


def test_the_time_of_validation_does_not_count(tmp_path, monkeypatch):
    set_clock(monkeypatch, iter(range(0, 1000, 10)).__next__)  # ten seconds between readings
    records = train(
        tmp_path, Throughput(), max_epochs=2, limit_train_batches=2, limit_val_batches=1.0
    )
    rates = [record["samples_per_second"] for record in records]
    assert rates == pytest.approx([2 / 10, 4 / 40] * 2)


def test_the_time_of_a_checkpoint_does_not_count(tmp_path, monkeypatch):
    set_clock(monkeypatch, iter(range(0, 1000, 10)).__next__)
    callbacks = (Throughput(), RunCheckpoint(every=2))
    records = train(tmp_path, *callbacks, enable_checkpointing=True)
    rates = [record["samples_per_second"] for record in records]
    assert rates == pytest.approx([2 / 10, 4 / 40] * 2)


def test_waiting_is_the_time_until_a_batch_has_arrived(tmp_path, monkeypatch):
    """Each batch but the first takes 1 second to load, and each 3 seconds to train on."""
    set_clock(monkeypatch, clock_of(waits=1, works=3))
    records = train(tmp_path, Throughput(window=2))
    waiting = [record["waiting_share"] for record in records]
    assert waiting == pytest.approx([0, 1 / 7, 2 / 8, 2 / 8])
    rates = [record["samples_per_second"] for record in records]
    assert rates == pytest.approx([2 / 3, 4 / 7, 4 / 8, 4 / 8])


def test_with_another_profiler_waiting_is_not_known(tmp_path):
    fitted = trainer(
        tmp_path, Throughput(), RunLog(), max_steps=1, limit_val_batches=0, profiler="simple"
    )
    fitted.fit(ToyTask(), ToyData(ROWS))
    [record] = read_log(tmp_path / "logging.jsonl")
    assert record["waiting_share"] is None
    assert record["samples_per_second"] > 0
    assert "train_dataloader_next" in fitted.profiler.summary()


def test_the_trainer_of_a_config_measures_waiting_unless_a_profiler_is_chosen(tmp_path):
    def profiler(*overrides: str):
        config = compose("train", [f"paths.run={tmp_path}", *overrides])
        return build.trainer(config, callbacks={}).profiler

    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        assert isinstance(profiler(), DataWaitProfiler)
        assert isinstance(profiler("+trainer.profiler=simple"), SimpleProfiler)


def test_compilations_are_counted_from_the_start_of_training(tmp_path):
    def twice(x):
        return 2 * x

    class Compiling(ToyTask):
        """From the third step on it has another shape, for which the function is recompiled."""

        def training_step(self, batch, batch_idx):
            compiled(torch.ones(2 if batch_idx < 2 else 3))
            return super().training_step(batch, batch_idx)

    compiled = torch.compile(twice, backend="eager", dynamic=False)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # before training
    records = train(tmp_path, Throughput(), module=Compiling())
    assert [record["compilations"] for record in records] == [1, 1, 2, 2]


def test_logged_values_are_on_the_host(tmp_path):
    class Recorder(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values = {
                name: metric.value
                for name, metric in trainer._results.items()
                if name.startswith("on_train_batch_end.train/")
            }
            assert len(values) == 8
            assert all(value.device.type == "cpu" for value in values.values())

    class OnAnotherDevice(ToyTask):
        device = torch.device("meta")  # where Lightning would put a plain number

    trainer(tmp_path, Throughput(), Recorder(), max_epochs=1, limit_val_batches=0).fit(
        OnAnotherDevice(), ToyData(ROWS)
    )


def test_slow_steps_leave_the_window(tmp_path, monkeypatch):
    set_clock(monkeypatch, clock_of(works=1, first=100))
    records = train(tmp_path, Throughput(window=2))
    rates = [record["samples_per_second"] for record in records]
    assert rates == pytest.approx([2 / 100, 4 / 101, 2, 2])


def test_a_test_and_a_prediction_end_with_their_rate(tmp_path, capsys):
    data = ToyData(test={"easy": ROWS[:3], "hard": ROWS[:2]})
    trainer(tmp_path, Throughput()).test(ToyTask(), data, verbose=False)
    trainer(tmp_path, Throughput()).predict(ToyTask(), data, return_predictions=False)
    printed = capsys.readouterr().out
    assert re.search(r"^test: 5 rows in \d+\.\d s, \d+\.\d images/s$", printed, re.MULTILINE)
    assert re.search(r"^predict: 5 rows in \d+\.\d s, \d+\.\d images/s$", printed, re.MULTILINE)


def test_operations_are_compared_with_the_peak_of_the_device(tmp_path, monkeypatch):
    """A batch of 2e12 operations takes a second, on a device that can do 8e12."""

    class Family:
        components: ClassVar = {"all": "weight"}

        def flops(self, batch, trained):
            return 1e12 * len(batch.conversations)

    class WithFamily(ToyTask):
        def __init__(self):
            super().__init__()
            self.family = Family()
            self.model = torch.nn.Linear(1, 1)

    set_clock(monkeypatch, clock_of(works=1))
    monkeypatch.setattr("qwenvl_lit.callbacks.throughput.peak_flops", lambda device: 8e12)
    records = train(tmp_path, Throughput(), module=WithFamily())
    assert [record["mfu"] for record in records] == pytest.approx([0.25] * 4)
    assert [record["tflop_per_second"] for record in records] == pytest.approx([2.0] * 4)


def test_a_device_without_a_known_peak_has_no_share_of_it(tmp_path):
    assert train(tmp_path, Throughput(), max_steps=1)[0]["mfu"] is None


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
    device = torch.device("cuda:0")
    assert peak_flops(device) == peak
    assert get_available_flops(device, torch.bfloat16) == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize(("name", "known"), [("NVIDIA H200", None), ("NVIDIA H100 NVL", 1978.8e12)])
def test_lightnings_table_of_peaks_cannot_replace_ours(monkeypatch, name, known):
    """It does not recognize the H200, and has the H100 NVL with sparsity."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert get_available_flops(torch.device("cuda:0"), torch.bfloat16) == known
    assert peak_flops(torch.device("cuda:0")) == dict(PEAKS)[name.removeprefix("NVIDIA ")]


def test_the_trained_share_of_a_component_excludes_the_component_inside_it():
    tower = torch.nn.ModuleDict({"block": torch.nn.Linear(3, 4), "pool": torch.nn.Linear(2, 4)})
    model = torch.nn.ModuleDict({"tower": tower})
    tower["pool"].requires_grad_(False)
    tower["block"].bias.requires_grad_(False)
    components = {"vision": "tower", "resampler": "tower.pool", "head": "head"}
    shares = trained_fractions(model, components)
    assert shares == {"vision": 12 / 16, "resampler": 0, "head": 0}
