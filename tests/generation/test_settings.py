"""Settings of generation that have no effect."""

import pytest

from qwenvl_lit.generation.generation import Generation, _warn_of_unused


@pytest.fixture(autouse=True)
def _warn_again():
    _warn_of_unused.cache_clear()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"top_p": 0.3, "top_k": 5}, "top_p=0.3, top_k=5"),
    ],
)
def test_settings_of_sampling_without_sampling_are_named_once(settings, named, caplog):
    for _ in range(2):
        Generation(**settings)
    [warning] = caplog.messages
    assert warning.startswith(f"{named} has no effect: decoding is greedy unless do_sample=true")


def test_settings_that_have_an_effect_or_are_neutral_give_no_warning(caplog):
    Generation(do_sample=True, temperature=0.7, top_p=0.3, top_k=5)
    Generation(temperature=0)
    assert not caplog.messages
