"""How many batches an optimizer step has, from the keys of a config."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from qwenvl_lit.cli.early_checks import check_values
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.settings import accumulated_batches, check_rows_per_step


@pytest.mark.parametrize(
    ("trainer", "data", "expected"),
    [
        ({"rows_per_step": 16}, {"batch_size": "auto"}, 1),  # one batch has all rows of the step
        ({"rows_per_step": 16, "accumulate_grad_batches": 1}, {"batch_size": "auto"}, 1),
        ({}, {"batch_size": "auto"}, 1),
        ({"rows_per_step": 16}, {"batch_size": 1}, 16),
        ({"rows_per_step": 16}, {"batch_size": 8}, 2),
        ({"rows_per_step": 16}, {"batch_size": 32}, 1),
        ({"rows_per_step": 16, "accumulate_grad_batches": 3}, {"batch_size": 8}, 3),
        ({"rows_per_step": 16}, {"batch_size": 1, "max_tokens": 8192}, 1),
        ({"rows_per_step": 16}, {"batch_size": "auto", "max_tokens": 8192}, 1),
        ({"accumulate_grad_batches": 4}, {"batch_size": "auto", "max_tokens": 8192}, 4),
        ({}, {"batch_size": 8}, 1),
    ],
)
def test_batches_of_an_optimizer_step(trainer, data, expected):
    assert accumulated_batches(trainer, data) == expected


@pytest.mark.parametrize(
    ("trainer", "data", "message"),
    [
        (
            {"rows_per_step": 16, "accumulate_grad_batches": 8},
            {"batch_size": "auto"},
            "remove it: trainer.rows_per_step=16 already sets the rows of a step",
        ),
        (
            {"accumulate_grad_batches": 8},
            {"batch_size": "auto"},
            "set trainer.rows_per_step, the rows of a step, in its place",
        ),
        (
            {"rows_per_step": 16},
            {"batch_size": 3},
            "trainer.rows_per_step=16 is not a multiple of data.batch_size=3",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(trainer, data, message):
    with pytest.raises(ValueError, match=message):
        accumulated_batches(trainer, data)


@pytest.mark.parametrize(
    ("keys", "data", "message"),
    [
        ({}, {"batch_size": 32}, "a step has 32 rows, 1 x data.batch_size=32; add data.batch_size"),
        ({"accumulate_grad_batches": 3}, {"batch_size": 8}, "a step has 24 rows, 3 x data.batch_s"),
        ({}, {"batch_size": "auto", "max_tokens": 8192}, "data.max_tokens=8192 limits the tokens"),
    ],
)
def test_rows_per_step_of_the_command_line_have_an_effect(keys, data, message):
    trainer = {"rows_per_step": 16, **keys}
    with pytest.raises(ValueError, match=f"trainer.rows_per_step=16 has no effect: {message}"):
        check_rows_per_step(trainer, data)
    check_rows_per_step({**trainer, "rows_per_step": None}, data)


@pytest.mark.parametrize("data", [{"batch_size": 4}, {"batch_size": "auto"}, {}])
def test_rows_per_step_of_the_command_line_are_cut_into_batches(data):
    check_rows_per_step({"rows_per_step": 16}, data)


def test_a_recipe_may_have_other_rows_per_step_than_the_command_line(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def check(*overrides: str) -> None:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose("train", [*overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        check_values(config)

    check("model=qwen_vl_chat", "data=jsonl", "data.batch_size=32")  # the recipe's 16 give way
    with pytest.raises(ValueError, match=r"rows_per_step=16 has no effect: a step has 32 rows"):
        check("trainer.rows_per_step=16")  # the demo's data
    check("trainer.rows_per_step=16", "data.batch_size=auto")
