"""What `loop_state` uses of Lightning: a version that changes it makes these tests fail."""

from copy import deepcopy

import lightning
import pytest
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.data.loop_state import (
    data_position,
    rebuild_train_loader,
    state_after_batch,
    validation_follows,
)

DATA = ToyData([conversation(i, says="yes") for i in range(8)])  # four batches an epoch


class Record(lightning.Callback):
    """Records the position at each batch, and the states after it."""

    def __init__(self):
        self.positions: list[tuple[int, int]] = []
        self.states: list[dict] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.positions.append(data_position(trainer))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append(deepcopy(state_after_batch(trainer)))


def record(folder, **options) -> Record:
    callback = Record()
    trainer(folder, callback, limit_val_batches=0, **options).fit(ToyTask(), DATA)
    return callback


def restored(folder, state: dict) -> lightning.Trainer:
    """Returns a trainer whose loops have the state, as at the start of a resumed run."""
    resumed = trainer(folder, max_epochs=9, limit_val_batches=0)
    resumed.fit_loop.load_state_dict(state)
    resumed.fit_loop.restarting = True
    return resumed


def test_the_state_of_the_loops_has_the_known_parts(tmp_path):
    state = record(tmp_path, max_epochs=1).states[0]
    assert state.keys() == {
        "state_dict",
        "epoch_loop.state_dict",
        "epoch_loop.batch_progress",
        "epoch_loop.scheduler_progress",
        "epoch_loop.automatic_optimization.state_dict",
        "epoch_loop.automatic_optimization.optim_progress",
        "epoch_loop.manual_optimization.state_dict",
        "epoch_loop.manual_optimization.optim_step_progress",
        "epoch_loop.val_loop.state_dict",
        "epoch_loop.val_loop.batch_progress",
        "epoch_progress",
    }
    assert state["epoch_progress"].keys() == {"total", "current"}
    assert state["epoch_loop.batch_progress"].keys() == {"total", "current", "is_last_batch"}
    counters = {"ready", "started", "processed", "completed"}
    assert state["epoch_progress"]["current"].keys() == counters
    assert state["epoch_loop.batch_progress"]["current"].keys() == counters


def test_within_an_epoch_the_state_is_lightnings_own(tmp_path):
    state = record(tmp_path, max_epochs=1).states[2]
    batches = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    assert state["epoch_loop.batch_progress"]["total"] == batches
    assert state["epoch_loop.batch_progress"]["current"] == batches
    epochs = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert state["epoch_progress"]["current"] == epochs
    assert state["epoch_loop.state_dict"]["_batches_that_stepped"] == 2


def test_after_the_last_batch_the_state_is_the_start_of_the_next_epoch(tmp_path):
    state = record(tmp_path, max_epochs=2).states[3]
    epochs = dict.fromkeys(("ready", "started", "processed", "completed"), 1)
    assert state["epoch_progress"] == {"total": epochs, "current": epochs}
    assert state["epoch_loop.batch_progress"] == {
        "total": dict.fromkeys(epochs, 4),
        "current": dict.fromkeys(epochs, 0),
        "is_last_batch": False,
    }
    assert state["epoch_loop.state_dict"]["_batches_that_stepped"] == 4


def test_an_uninterrupted_run_begins_each_epoch_at_its_first_batch(tmp_path):
    assert record(tmp_path, max_epochs=3).positions == [(0, 0), (1, 0), (2, 0)]


def test_overfitting_repeats_the_first_epoch(tmp_path):
    assert record(tmp_path, max_epochs=2, overfit_batches=2).positions == [(0, 0), (0, 0)]


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 8}])
def test_a_restored_state_continues_after_its_batch(tmp_path, limit):
    states = record(tmp_path, **limit).states
    positions = [data_position(restored(tmp_path, state)) for state in states]
    assert positions == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


def test_the_rebuilt_loader_is_read_from_its_start(tmp_path):
    class Rebuild(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = trainer.train_dataloader
            rebuild_train_loader(trainer)
            self.after = trainer.train_dataloader

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rows.append(batch.conversations[0].id)

    rows: list[str] = []
    rebuild = Rebuild()
    trainer(tmp_path, rebuild, max_epochs=1, limit_val_batches=0).fit(ToyTask(), DATA)
    assert rebuild.after is not rebuild.before
    assert rows == ["row 0", "row 2", "row 4", "row 6"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_val_batches": 0},
        {"val_check_interval": 3},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"limit_train_batches": 3, "val_check_interval": 1.0},
    ],
    ids=str,
)
def test_validation_follows_where_it_is_said_to(tmp_path, options):
    class Follow(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if validation_follows(trainer):
                expected.append(trainer.global_step)

        def on_validation_start(self, trainer, pl_module):
            validated.append(trainer.global_step)

    expected: list[int] = []
    validated: list[int] = []
    trainer(tmp_path, Follow(), max_epochs=3, **options).fit(ToyTask(), DATA)
    assert expected == validated
    assert bool(validated) == (options != {"limit_val_batches": 0})
