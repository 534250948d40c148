"""A run that early stopping ends says so, and its settings are keys of the config."""

import inspect

import pytest
from commands import compose_config
from hydra.utils import get_class, instantiate
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.early_stopping import why_stopped
from qwenvl_lit.callbacks.validation import ValidationSchedule

DATA = ToyData([conversation(index) for index in range(20)])  # ten steps
# Keys that only the package sets
INTERNAL = {"filename", "verbose", "strict", "log_rank_zero_only"}


class Losses(ToyTask):
    """Logs these validation losses."""

    def __init__(self, losses):
        super().__init__()
        self.losses = iter(losses)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", float(next(self.losses)))


def stopped(folder, losses, *overrides: str) -> tuple[int, str | None]:
    """Trains with early stopping; returns the last step and why the run was stopped."""
    settings = [f"callbacks.early_stopping.{override}" for override in overrides]
    config = compose_config("train", "callbacks=[train,early_stopping]", *settings)
    schedule = ValidationSchedule(1)
    callbacks = schedule, instantiate(config.callbacks.early_stopping)
    run = trainer(folder, *callbacks, max_epochs=1, **schedule.trainer_options)
    run.fit(Losses(losses), DATA)
    return run.global_step, why_stopped(run)


@pytest.mark.parametrize(
    ("losses", "overrides", "step", "reason"),
    [
        ([3, 2, 2, 2], ["patience=2"], 4, "has not improved in the last 2 validations; its best "),
        ([3, 2.9, 2.8], ["patience=1", "min_delta=0.5"], 2, "improved by 0.5 in the last valid"),
        ([3, 2, 1], ["stopping_threshold=2.5"], 2, "val/loss has reached stopping_threshold=2.5"),
        ([3, 9], ["divergence_threshold=5"], 2, "val/loss has passed divergence_threshold=5"),
        ([3, "nan"], [], 2, "val/loss is not finite; its best was 3"),
    ],
)
def test_a_run_says_why_it_was_stopped(losses, overrides, step, reason, tmp_path):
    last, why = stopped(tmp_path, losses, *overrides)
    assert last == step
    assert reason in why


def test_a_run_that_reaches_its_end_was_not_stopped(tmp_path):
    assert stopped(tmp_path, range(10, 0, -1)) == (10, None)


def test_every_argument_of_a_callback_is_a_key():
    choices = "[train,test,predict,early_stopping]"
    callbacks = compose_config("train", f"callbacks={choices}").callbacks
    for name, node in callbacks.items():
        parameters = inspect.signature(get_class(node._target_)).parameters.values()
        named = {item.name for item in parameters if item.kind is not item.VAR_KEYWORD}
        assert named - INTERNAL <= set(node), name
