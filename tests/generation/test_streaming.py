"""Answers are streamed with transformers' `generate` too, for networks without a decoder."""

import threading

import pytest
import torch
from small_network import IMAGE, image_positions, images, small_network, text

from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.types import DataError

ENDS = {"stop_ids": (7, 9), "pad_id": 0}


@pytest.fixture
def model(monkeypatch):
    model = small_network()
    monkeypatch.setattr(type(model), "decoder", lambda self: None)
    return model


@pytest.fixture
def steps(model) -> list[int]:
    """A list that grows with each forward pass."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(len(passes)))
    return passes


def prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = [text(3, seed=seed) + IMAGE + text(5, seed=seed)]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(1, len(ids[0]), dtype=torch.int64),
        "pixel_values": images(1),
        "vision_positions": image_positions(ids),
    }


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "generate"]


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "seed": 3}, {"min_new_tokens": 12}, {"repetition_penalty": 1.4}],
    ids=str,
)
def test_a_stream_has_the_ids_of_the_answer_one_at_a_time(model, options):
    generation = Generation(max_new_tokens=12, **options)
    for seed in range(4):
        inputs = prompt(seed)
        [answer] = generation(model, inputs, **ENDS)
        pieces = list(generation.stream(model, inputs, **ENDS))
        assert pieces == [[token_id] for token_id in answer]
    if "min_new_tokens" in options:
        assert len(answer) == 12


def test_ids_arrive_while_the_answer_is_decoded(model, steps):
    generation = Generation(max_new_tokens=12, min_new_tokens=12)
    stream = generation.stream(model, prompt(), **ENDS)
    for count in range(1, 12):
        next(stream)
        # One step is in the queue, and one waits for its place there
        assert len(steps) <= count + 3
    assert len(list(stream)) == 1
    assert not threads()


def test_a_stream_that_is_left_early_decodes_no_further(model, steps):
    generation = Generation(max_new_tokens=500, min_new_tokens=500)
    stream = generation.stream(model, prompt(), **ENDS)
    next(stream)
    stream.close()
    assert not threads()
    assert len(steps) < 10


def test_stop_words_end_a_stream(model):
    generation = Generation(max_new_tokens=12, min_new_tokens=12)
    ids = [token_id for [token_id] in generation.stream(model, prompt(), **ENDS)]
    stopped = Generation(max_new_tokens=12, min_new_tokens=12, stop_words_ids=[ids[4:6]])
    [answer] = stopped(model, prompt(), **ENDS)
    streamed = [token_id for piece in stopped.stream(model, prompt(), **ENDS) for token_id in piece]
    assert streamed == answer == ids[: ids.index(ids[4])]
    assert not threads()


def test_an_error_of_the_network_is_raised_by_the_stream(model):
    def broken(*_):
        raise RuntimeError("no memory")

    handle = model.lm_head.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="no memory"):
        list(Generation(max_new_tokens=3).stream(model, prompt(), **ENDS))
    handle.remove()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match="finite"):
        next(Generation(max_new_tokens=500).stream(model, prompt(), **ENDS))
    assert not threads()


def test_a_stream_decodes_under_the_autocast_of_its_caller(model):
    dtypes = set()
    model.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            list(Generation(max_new_tokens=2).stream(model, prompt(), **ENDS))
    assert dtypes == {torch.bfloat16, torch.float32}
