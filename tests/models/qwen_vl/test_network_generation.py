import pytest
import torch
from small_network import (
    CLOSE,
    GREEDY,
    IMAGE,
    image_positions,
    images,
    padded,
    small_network,
    talk_of_two,
    tensor,
    text,
)
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache

from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM


@pytest.fixture
def model() -> QwenVLForCausalLM:
    return small_network()


@pytest.fixture
def talk() -> dict[str, torch.Tensor]:
    return talk_of_two()


# -- long texts ------------------------------------------------------------------------------------


def test_a_long_text_does_not_change_later_results(model):
    short, long = tensor(text(20)), tensor(text(90))
    before = model(short).logits
    in_training = model.train()(long).logits
    model.eval()(long)
    assert torch.equal(model(short).logits, before)
    assert torch.equal(model.train()(long).logits, in_training)


@pytest.mark.parametrize("length", [30, 50])
def test_alpha_is_that_of_the_prompt_throughout_a_generation(model, length):
    ids = tensor(text(80))

    def decode(cache) -> torch.Tensor:
        logits = [model(ids[:, :length], past_key_values=cache).logits[:, -1:]]
        for token in ids[:, length:].split(1, dim=1):
            logits.append(model(token, past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    dynamic, other = DynamicCache(), DynamicCache()
    expected = decode(dynamic)
    assert dynamic.ntk_alpha == {30: 1, 50: 3}[length]
    model(tensor(text(70, seed=1)), past_key_values=other)
    assert other.ntk_alpha == 7
    static = StaticCache(config=model.config, max_cache_len=96)
    torch.testing.assert_close(decode(static), expected, **CLOSE)
    static.reset()
    model(tensor(text(70, seed=1)), past_key_values=static)
    assert static.ntk_alpha == 7
    static.reset()
    torch.testing.assert_close(decode(static), expected, **CLOSE)


# -- generation ------------------------------------------------------------------------------------


# Prompts within seq_length = 32 and above it; the latter only with a cache. Without one the whole
# text is the prompt of every step, and alpha follows its length.
@pytest.mark.parametrize(
    ("cache_implementation", "extra"),
    [("dynamic", 0), ("static", 0), (None, 0), ("dynamic", 30), ("static", 30)],
)
def test_greedy_decoding_is_the_same_with_any_cache(model, cache_implementation, extra):
    first = text(3) + IMAGE + text(5 + extra)
    second = IMAGE + text(2) + IMAGE + text(4 + extra, seed=1)
    rows, mask = padded([first, second], side="left")
    batch = {
        "input_ids": tensor(*rows),
        "attention_mask": mask,
        "pixel_values": images(3),
        "vision_positions": image_positions(rows),
    }
    length, cache = tensor(*rows).shape[1], DynamicCache()
    new = model(**batch, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    expected = [new]
    for _ in range(11):
        mask = nn.functional.pad(mask, (0, 1), value=1)
        logits = model(new, attention_mask=mask, past_key_values=cache).logits
        new = logits[:, -1].argmax(-1, keepdim=True)
        expected.append(new)
    options = {"cache_implementation": cache_implementation}
    if cache_implementation is None:
        options = {"use_cache": False}
    for _ in range(2):  # the second time transformers reuses the static cache of the first
        new = model.generate(**batch, **GREEDY, **options)[:, length:]
        assert torch.equal(new, torch.cat(expected, dim=1))


def test_a_prompt_of_one_token_does_not_inherit_the_alpha_of_a_long_one(model):
    options = GREEDY | {"cache_implementation": "static", "max_new_tokens": 40}
    long, one = tensor(text(60)), tensor([5])
    expected = model.generate(one, **GREEDY | {"max_new_tokens": 40})
    model.generate(long, **options)
    assert torch.equal(model.generate(one, **options), expected)


@pytest.mark.parametrize(
    "given", ["pixel_values", "vision_features", "nothing but pixels", "no cache"]
)
def test_beams_attend_to_the_images_of_their_row(model, talk, given):
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "use_cache": given != "no cache"}
    expected = []
    for row, chosen in ((0, slice(0, 1)), (1, slice(1, 3))):
        ids = talk["input_ids"][row][talk["attention_mask"][row].bool()][None]
        answers = model.generate(ids, pixel_values=talk["pixel_values"][chosen], **options)
        expected.append(answers[:, ids.shape[1] :])
    if given == "vision_features":
        talk["vision_features"] = model.get_image_features(talk.pop("pixel_values"))
    if given == "nothing but pixels":
        del talk["vision_positions"]
    new = model.generate(**talk, **options)[:, talk["input_ids"].shape[1] :]
    assert torch.equal(new, torch.cat(expected))


def test_the_tower_runs_once_for_all_answers(model, talk):
    runs = []
    model.transformer.visual.register_forward_hook(lambda module, args, out: runs.append(len(out)))
    model.generate(**talk, **GREEDY | {"do_sample": True, "num_return_sequences": 4})
    assert runs == [3]


def test_sampling_from_the_best_token_alone_is_greedy(model, talk):
    greedy = model.generate(**talk, **GREEDY)
    assert torch.equal(model.generate(**talk, **GREEDY | {"do_sample": True, "top_k": 1}), greedy)


def test_a_prompt_may_be_embeddings(model, talk):
    embedded = {**talk, "inputs_embeds": model.get_input_embeddings()(talk["input_ids"])}
    del embedded["input_ids"]
    expected = model.generate(**talk, **GREEDY)[:, talk["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**embedded, **GREEDY), expected)
    beams = GREEDY | {"num_beams": 2}
    expected = model.generate(**talk, **beams)[:, talk["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**embedded, **beams), expected)


def test_a_second_turn_continues_from_the_cache(model):
    first, second = text(3) + IMAGE + text(5), text(4, seed=1)

    def answer(ids: torch.Tensor, **kwargs):
        options = {**GREEDY, **kwargs, "return_dict_in_generate": True}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    before = answer(tensor(first), pixel_values=images(1))
    ids = torch.cat((before.sequences, tensor(second)), dim=1)
    image = {"pixel_values": images(1), "vision_positions": image_positions([first])}
    expected = answer(ids, **image).sequences
    assert torch.equal(answer(ids, past_key_values=before.past_key_values).sequences, expected)


def test_decoding_compiles_into_one_graph(model, talk):
    expected = model.generate(**talk, **GREEDY)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    static = GREEDY | {"cache_implementation": "static"}
    assert torch.equal(model.generate(**talk, **static), expected)


def test_continuous_batching_is_refused():
    """It packs prompts into one row with a cache, where `forward` ignores their positions."""
    model = small_network()
    settings = GenerationConfig(**GREEDY)
    with pytest.raises(NotImplementedError, match=r"use qwenvl_lit\.QwenVL, or generate"):
        model.generate_batch(inputs=[text(5), text(9)], generation_config=settings)
    with (
        pytest.raises(NotImplementedError, match="would give wrong answers"),
        model.continuous_batching_context_manager(generation_config=settings),
    ):
        pass
