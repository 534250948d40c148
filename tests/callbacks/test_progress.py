import lightning
import pytest
import rich
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.progress import BarColumn
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.progress import BAR_WIDTH, OTHERS_WIDTH, ProgressBar

DATA = ToyData([conversation(i, says="yes") for i in range(8)])  # four batches an epoch


class Bars(lightning.Callback):
    """Records description, batches done and batches in all of the bar at the end of each epoch."""

    def __init__(self):
        self.shown = []

    def on_train_epoch_end(self, trainer, pl_module):
        bar = trainer.progress_bar_callback.train_progress_bar
        self.shown.append((bar.description.strip(), bar.completed, bar.total))


def fit(folder, *callbacks, ckpt_path=None, **options) -> list[tuple[str, int, int]]:
    bars = Bars()
    fitted = trainer(
        folder,
        ProgressBar(leave=True),
        bars,
        *callbacks,
        enable_progress_bar=True,
        limit_val_batches=0,
        **options,
    )
    fitted.fit(ToyTask(), DATA, ckpt_path=ckpt_path, weights_only=True)
    return bars.shown


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"max_epochs": 2}, [("Epoch 0/1", 4, 4), ("Epoch 1/1", 4, 4)]),
        ({"max_epochs": 9, "max_steps": 6}, [("Epoch 0/8", 4, 4), ("Epoch 1/8", 2, 2)]),
        ({"max_epochs": -1, "max_steps": 6}, [("Epoch 0", 4, 4), ("Epoch 1", 2, 2)]),
        (
            {"max_epochs": 2, "max_steps": 3, "accumulate_grad_batches": 3},
            [("Epoch 0/1", 4, 4), ("Epoch 1/1", 3, 3)],
        ),
    ],
    ids=["epochs", "epochs and steps", "steps", "steps of three batches and of one"],
)
def test_the_bar_is_full_when_the_run_ends(tmp_path, options, shown):
    assert fit(tmp_path, **options) == shown


def test_the_bar_of_a_run_resumed_within_an_epoch_has_the_same_end(tmp_path):
    checkpoints = ModelCheckpoint(
        dirpath=tmp_path,
        filename="at_{step}",
        every_n_train_steps=2,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )
    fit(tmp_path, checkpoints, max_epochs=1, max_steps=3, enable_checkpointing=True)
    resumed = fit(tmp_path, max_epochs=1, max_steps=3, ckpt_path=tmp_path / "at_2.ckpt")
    assert resumed == [("Epoch 0/0", 3, 3)]


@pytest.mark.parametrize(("width", "count"), [(60, 1), (80, 2), (120, 3)])
def test_the_bar_has_one_line_in_a_terminal_of_any_width(tmp_path, monkeypatch, width, count):
    monkeypatch.setattr(rich.get_console(), "_width", width)
    bar = ProgressBar()
    fake = trainer(tmp_path, max_epochs=1)
    logged = {"train/loss": 0.1234, "val/loss": 1.555, "train/samples_per_second": 148.25}
    fake.callback_metrics.update(logged)
    values = bar.get_metrics(fake, ToyTask())
    assert values == dict([("loss", "0.1234"), ("val", "1.555"), ("samples/s", "148.2")][:count])
    [column] = [c for c in bar.configure_columns(fake) if isinstance(c, BarColumn)]
    text = " ".join(f"{label}: {value}" for label, value in values.items())
    if width > 60:
        assert OTHERS_WIDTH + column.bar_width + len(text) <= width
        assert column.bar_width >= BAR_WIDTH
