import io
import random

import numpy as np
import torch

from qwenvl_lit.training.rng import rng_state, set_rng_state


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), np.random.rand(), float(torch.rand(()))


def test_a_restored_state_draws_the_same_numbers():
    state = rng_state()
    first, second = draw(), draw()
    assert first != second
    set_rng_state(state)
    assert (draw(), draw()) == (first, second)


def test_a_state_is_read_without_code():
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = draw()
    buffer.seek(0)
    set_rng_state(torch.load(buffer, weights_only=True))
    assert draw() == expected
