"""Every run validates after its last step, and before that as often as it is asked to."""

import lightning
import pytest
from commands import compose_config
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.checkpoint import RunCheckpoint
from qwenvl_lit.callbacks.run_log import RunLog
from qwenvl_lit.callbacks.validation import ValidationSchedule, is_due
from qwenvl_lit.metrics.summary import read_fit_summary

DATA = ToyData([conversation(index) for index in range(14)])  # seven batches an epoch


class Validations(lightning.Callback):
    """Records the optimizer steps after which the trainer validates."""

    def __init__(self):
        self.steps: list[int] = []

    def on_validation_start(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


def validated(folder, schedule: ValidationSchedule, *callbacks, **options) -> list[int]:
    validations = Validations()
    options = {**schedule.trainer_options, "max_epochs": 1, **options}
    trainer(folder, schedule, validations, *callbacks, **options).fit(ToyTask(), DATA)
    return validations.steps


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (50, {}, [7]),
        (None, {"max_epochs": 2}, [14]),
        (3, {"max_epochs": 2}, [3, 6, 9, 12, 14]),
        # Four steps an epoch: the last one has a single batch.
        (3, {"max_epochs": 2, "accumulate_grad_batches": 2}, [3, 6, 8]),
        (0.5, {"max_epochs": 2}, [4, 7, 10, 14]),
        (2.0, {"max_epochs": 5}, [14, 28, 35]),
        (1.0, {"max_epochs": -1, "max_steps": 9}, [7, 9]),
        (50, {"limit_val_batches": 0}, []),
        (50, {"fast_dev_run": True}, [1]),
    ],
    ids=str,
)
def test_the_interval_is_in_optimizer_steps_or_epochs(every, options, steps, tmp_path):
    assert validated(tmp_path, ValidationSchedule(every), **options) == steps


@pytest.mark.parametrize(
    ("batches", "options", "steps"),
    [
        (4, {"max_epochs": 2}, [4, 8, 12, 14]),
        (0.5, {"max_steps": 5}, [3, 5]),
        ("01:00:00:00", {}, [7]),
    ],
)
def test_an_interval_in_batches_replaces_it(batches, options, steps, tmp_path):
    schedule = ValidationSchedule(1, batches=batches)
    assert validated(tmp_path, schedule, **options) == steps


def test_a_run_shorter_than_the_interval_has_scores_and_a_best_checkpoint(tmp_path):
    callbacks = RunLog(), RunCheckpoint()
    validated(tmp_path, ValidationSchedule(50), *callbacks, enable_checkpointing=True)
    assert read_fit_summary(tmp_path).scores["val/loss"] is not None
    assert {file.name for file in tmp_path.glob("checkpoints/*.ckpt")} == {"best.ckpt", "last.ckpt"}


def test_a_quarter_of_an_epoch_is_four_validations_whatever_its_steps():
    for steps in (4, 7, 50, 720, 1001):
        due = [step for step in range(1, 2 * steps + 1) if is_due(step, 0.25 * steps)]
        assert len(due) == 8
        assert {steps, 2 * steps} < set(due)
    assert all(is_due(step, 0.1) for step in range(1, 5))


def test_the_recipes_validate_every_50_optimizer_steps_or_by_epochs():
    recipe = compose_config("train", "model=qwen_vl_chat").trainer
    assert (recipe.validate_every, recipe.val_check_interval) == (50, None)
    assert compose_config("train").trainer.validate_every == 0.25


@pytest.mark.parametrize("every", [0, -1, 0.0, -0.5, float("nan"), "often", True])
def test_a_wrong_interval_is_named(every):
    with pytest.raises(ValueError, match=r"trainer\.validate_every must be a "):
        ValidationSchedule(every)
