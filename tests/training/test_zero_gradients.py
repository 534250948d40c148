"""A trained tensor that the data gives no gradient stops the run in its first steps."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_task
from torch import nn
from toy_task import batch_of, conversation, trainer

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.zero_gradients import STEPS, ZeroGradientGuard
from qwenvl_lit.types import Conversation, DataError, Turn

COMPONENTS = {"vision": "visual", "language": "h"}
TEXT = replace(batch_of([conversation(0)]), vision_positions=torch.zeros(0, dtype=torch.int64))
IMAGE = replace(TEXT, vision_positions=torch.ones(4, dtype=torch.int64))


class Steps:
    """Gives a guard the gradients of steps; a gradient is filled with one number."""

    def __init__(self, *, rows_have_images: bool = True, **learning_rates: float):
        self.guard = ZeroGradientGuard(COMPONENTS)
        self.rows_have_images = rows_have_images
        self.tensors = {name: nn.Parameter(torch.ones(2)) for name in ("h.a", "h.b", "visual.c")}
        groups = []
        for name, tensor in self.tensors.items():
            groups.append({"params": [tensor], "lr": learning_rates.get(name[-1], 1.0)})
        self.optimizer = torch.optim.AdamW(groups)

    def make(self, batch, a: float, b: float, c: float) -> None:
        self.guard.check(rows_have_images=self.rows_have_images)
        for tensor, value in zip(self.tensors.values(), (a, b, c), strict=True):
            tensor.grad = torch.full((2,), float(value))
        gradients = {name: tensor.grad for name, tensor in self.tensors.items()}
        self.guard.note(gradients, [batch], self.optimizer)

    def finish(self) -> None:
        self.guard.finish(rows_have_images=self.rows_have_images)


def test_a_gradient_that_stays_zero_is_an_error_one_step_after_the_first_steps():
    steps = Steps()
    for _ in range(STEPS):
        steps.make(IMAGE, 1, 0, 1)
    with pytest.raises(DataError, match=r"gradients of 1 of 3 trained .* \(language\) .*h\.b\. "):
        steps.make(IMAGE, 1, 1, 1)


def test_one_gradient_in_the_first_steps_is_enough_and_later_steps_are_not_read():
    steps = Steps()
    for step in range(STEPS):
        steps.make(IMAGE, step == 2, step == 4, step == 1)
    steps.guard.check(rows_have_images=True)
    steps.guard.note({"h.a": "not a tensor"}, [], steps.optimizer)
    steps.finish()


def test_steps_without_images_say_nothing_about_the_vision_tower():
    steps = Steps()
    for _ in range(3 * STEPS):
        steps.make(TEXT, 1, 1, 0)
    for _ in range(STEPS):
        steps.make(IMAGE, 1, 1, 0)
    with pytest.raises(DataError, match=r"\(vision\).*nothing in the rows depends on them"):
        steps.finish()


@pytest.mark.parametrize("made", [1, STEPS, STEPS + 1])
def test_rows_without_images_cannot_train_a_vision_tower(made):
    steps = Steps(rows_have_images=False, a=0, b=0)

    def run():
        for _ in range(made):
            steps.make(TEXT, 1, 1, 0)
        steps.finish()

    with pytest.raises(DataError, match=r"have no images.*adapter=full adapter\.freeze=\["):
        run()


def test_a_tensor_whose_learning_rate_is_zero_is_not_checked():
    steps = Steps(a=0)
    for _ in range(STEPS):
        steps.make(IMAGE, 0, 1, 1)
    steps.finish()


def test_a_short_run_is_refused_only_if_nothing_got_a_gradient():
    steps = Steps()
    steps.make(IMAGE, 1, 0, 0)
    steps.finish()
    steps = Steps()
    steps.make(IMAGE, 0, 0, 0)
    with pytest.raises(DataError, match="3 of 3 trained tensors"):
        steps.finish()


def read_text(source: str, read_options) -> list[Conversation]:
    rows = []
    for index, letter in enumerate(source):
        answer = Turn(role="assistant", parts=(letter,))
        turns = (Turn(role="user", parts=("Repeat.",)), answer)
        rows.append(Conversation(id=letter, turns=turns, index=index))
    return rows


@pytest.mark.parametrize("adapter", ["lora", "resampler"])
def test_text_trains_adapters_of_the_language_model_and_not_the_resampler(adapter, tmp_path):
    choices = {
        "lora": LoRA(rank=2, alpha=4, dropout=0.0, targets="language"),
        "resampler": Full(freeze=["all"], train=["resampler"]),
    }
    module = tiny_task(choices[adapter])
    data = DataModule(processor=module.processor, read=read_text, train="abcdefgh")
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    if adapter == "lora":
        run.fit(module, data)
    else:
        with pytest.raises(DataError, match=r"\(resampler\) were exactly zero.*have no images"):
            run.fit(module, data)
    assert run.global_step == (8 if adapter == "lora" else STEPS)
