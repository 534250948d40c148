"""The decoder against transformers' `generate`."""

from functools import partial

import pytest
import torch
from small_qwen3_vl import (
    CLOSE,
    KINDS,
    PROMPTS,
    for_transformers,
    original_network,
    padded,
    prompt,
    small_network,
)
from torch import nn

from qwenvl_lit.models.qwen3_vl import decoder as decoder_module
from qwenvl_lit.models.qwen3_vl.decoder import Decoder, passes
from qwenvl_lit.models.qwen3_vl.network import image_features

NEW_TOKENS = 8
TEXTS = (prompt(6, seed=1), prompt(9, seed=2))
KEYS = [f"image {index}" for index in range(4)]


@pytest.fixture(params=KINDS)
def network(request) -> nn.Module:
    return small_network(request.param)


def prompts_of(prompts, network: nn.Module) -> dict:
    inputs = padded(prompts, network.config, side="left")
    del inputs["labels"]
    return inputs


@torch.inference_mode()
def answer(decoder: Decoder, inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids (n, NEW_TOKENS) of a greedy answer, and their logits (n, NEW_TOKENS, V)."""
    logits = [decoder.start(inputs, new_tokens=NEW_TOKENS, **options)]
    ids = [logits[0].argmax(-1)]
    while len(ids) < NEW_TOKENS:
        logits.append(decoder.step(ids[-1]).clone())
        ids.append(logits[-1].argmax(-1))
    return torch.stack(ids, dim=1), torch.stack(logits, dim=1)


@pytest.mark.parametrize("prompts", [PROMPTS, TEXTS, PROMPTS[:1]], ids=["images", "texts", "one"])
def test_answers_are_those_of_transformers(network, prompts):
    inputs = prompts_of(prompts, network)
    result = original_network(network).generate(
        **for_transformers(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids, logits = answer(network.decoder(), inputs)
    assert torch.equal(ids, result.sequences[:, inputs["input_ids"].shape[1] :])
    torch.testing.assert_close(logits, torch.stack(result.logits, dim=1), **CLOSE)


def test_a_row_of_a_batch_is_answered_as_it_is_alone(network):
    decoder = network.decoder()
    ids, logits = answer(decoder, prompts_of(PROMPTS, network))
    for row, one in enumerate(PROMPTS):
        alone = answer(decoder, prompts_of([one], network))
        assert torch.equal(ids[row], alone[0][0])
        torch.testing.assert_close(logits[row], alone[1][0], **CLOSE)


def test_prompts_are_prefilled_and_images_encoded_in_passes(network, monkeypatch):
    inputs = prompts_of(PROMPTS, network)
    expected = answer(network.decoder(), inputs)[1]
    two_rows = 2 * inputs["input_ids"].shape[1]
    monkeypatch.setattr("qwenvl_lit.models.static_decoder.PROMPT_TOKENS", two_rows)
    monkeypatch.setattr(decoder_module, "PATCHES_PER_PASS", 40)
    torch.testing.assert_close(answer(network.decoder(), inputs)[1], expected, **CLOSE)


def test_a_pass_of_the_tower_has_a_limited_number_of_patches(monkeypatch):
    monkeypatch.setattr(decoder_module, "PATCHES_PER_PASS", 10)
    sizes = [(2, 2), (2, 3), (4, 4), (2, 2)]
    assert list(passes([0, 1, 2, 3], sizes)) == [[0, 1], [2], [3]]
    assert list(passes([], sizes)) == []


def test_an_image_is_encoded_once(network, monkeypatch):
    inputs = prompts_of(PROMPTS, network)
    expected = answer(network.decoder(), inputs)[1]
    encoded = []
    encode = network.encode_images

    def counting(pixel_values, vision):
        encoded.append(len(pixel_values))
        return encode(pixel_values, vision)

    monkeypatch.setattr(network, "encode_images", counting)
    decoder = network.decoder()
    for _ in range(2):
        logits = answer(decoder, inputs, image_keys=KEYS)[1]
        torch.testing.assert_close(logits, expected, **CLOSE)
    assert encoded == [len(inputs["pixel_values"])]
    # The third image again, in another prompt
    other = prompts_of([PROMPTS[3]], network)
    torch.testing.assert_close(
        answer(decoder, other, image_keys=KEYS[3:])[1][0], expected[3], **CLOSE
    )
    assert len(encoded) == 1


def test_features_take_the_place_of_pixels(network):
    inputs = prompts_of(PROMPTS, network)
    expected = answer(network.decoder(), inputs)[1]
    inputs["vision_features"] = torch.cat(image_features(network, inputs))
    del inputs["pixel_values"]
    torch.testing.assert_close(answer(network.decoder(), inputs)[1], expected, **CLOSE)


def test_graphs_of_more_rows_and_compiled_blocks_change_nothing(network, monkeypatch):
    inputs = prompts_of(PROMPTS, network)
    expected = answer(network.decoder(), inputs)[1]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    decoder = network.decoder()
    monkeypatch.setattr(decoder, "_choose_rows", lambda n, slots: 8)
    logits = answer(decoder, inputs, compiled=True)[1]
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert decoder.compiled  # it would have been turned off by an error


@torch.inference_mode()
def test_a_second_answer_ends_the_first(network):
    decoder = network.decoder()
    inputs = prompts_of(TEXTS, network)
    first = decoder.start(inputs, new_tokens=2)
    number = decoder.answer
    decoder.start(inputs, new_tokens=2)
    with pytest.raises(ValueError, match="another answer of this model"):
        decoder.step(first.argmax(-1), number)


def test_autocast_decodes_in_its_precision(network):
    inputs = prompts_of(PROMPTS, network)
    expected = answer(network.decoder(), inputs)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = network.decoder()
        logits = answer(decoder, inputs)[1]
    assert decoder.cache.memory.dtype == torch.bfloat16
    torch.testing.assert_close(logits[:, 0].float(), expected[:, 0], atol=0.2, rtol=0.1)


@torch.inference_mode()
def test_a_step_neither_synchronizes_nor_leaves_the_device(network, monkeypatch):
    """The meta device has no values, so whatever would synchronize raises there."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # no support there
    decoder = network.to("meta").decoder()
    # Without a mask: `start` reads the lengths of the rows from it, once.
    inputs = {"input_ids": torch.empty(6, 20, dtype=torch.int64, device="meta")}
    logits = decoder.start(inputs, new_tokens=8)
    for _ in range(2):
        logits = decoder.step(logits.argmax(-1))
    assert logits.is_meta
    assert logits.shape == (6, 64)


# -- appended tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5])
def test_appended_tokens_have_the_logits_of_steps(network, tokens):
    inputs = prompts_of(PROMPTS, network)
    decoder = network.decoder()
    ids, logits = answer(decoder, inputs)
    shown = []
    with torch.inference_mode():
        decoder.start(
            inputs, new_tokens=NEW_TOKENS, show_heads=lambda layer, *_: shown.append(layer)
        )
        appended = decoder.append(
            ids[:, :tokens], show_heads=lambda layer, q, k, mask: shown.append(tuple(q.shape))
        )
        following = decoder.step(ids[:, tokens])
    torch.testing.assert_close(appended, logits[:, 1 : tokens + 1], **CLOSE)
    torch.testing.assert_close(following, logits[:, tokens + 1], **CLOSE)
    assert shown == [0, 1, 2, *[(len(PROMPTS), 4, tokens, 8)] * 3]
