"""How many batches an optimizer step has, from the keys of a config."""

import pytest

from qwenvl_lit.settings import accumulated_batches


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
            "set trainer.rows_per_step=8, or data.batch_size=1 as well",
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
