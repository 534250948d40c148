"""Hidden states are the outputs of blocks and resampler, by module path."""

import pytest
import torch
from PIL import Image
from tiny import tiny_family
from tiny_qwen3_vl import KINDS, tiny_qwen3_vl

from qwenvl_lit.api import QwenVL
from qwenvl_lit.data.readers.question import question_options
from qwenvl_lit.generation.generation import Generation

QUERY = [Image.new("RGB", (64, 64), "teal"), "What is this?"]


def loaded(family) -> QwenVL:
    return QwenVL(
        family=family,
        model=family.load(),
        device=torch.device("cpu"),
        generation=Generation(max_new_tokens=3),
        read_options=question_options(),
    )


def test_tower_resampler_and_language_model_are_recorded():
    model = loaded(tiny_family())
    states = model.hidden_states(QUERY)
    tokens = len(
        model.processor.encode(model._conversation(QUERY, None, None), prompt=True).input_ids
    )
    assert {path: tuple(state.shape) for path, state in states.items()} == {
        "transformer.visual.transformer.resblocks.0": (1, 4, 16),
        "transformer.visual.attn_pool": (1, 4, 32),
        "transformer.h.0": (1, tokens, 32),
    }
    network = model.model
    logits = network.lm_head(network.transformer.ln_f(states["transformer.h.0"]))[0, -1]
    [answer] = model.generate([QUERY], max_new_tokens=1, min_new_tokens=1)
    assert logits.argmax() == answer.ids[0]
    assert not network.transformer.h[0]._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_other_families_are_recorded_and_paths_may_be_chosen(kind):
    model = loaded(tiny_qwen3_vl(kind))
    states = model.hidden_states(QUERY)
    assert len(states) == 2 + 1 + 2
    assert list(model.hidden_states(QUERY, only=r".*layers\.\d+")) == [
        "model.language_model.layers.0",
        "model.language_model.layers.1",
    ]
    with pytest.raises(ValueError, match=r"only='h.0' matches no module; there are model.visual"):
        model.hidden_states(QUERY, only="h.0")
