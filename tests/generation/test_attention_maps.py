"""Attention maps are the weights of attention that the eager networks compute."""

import re

import pytest
import torch
from PIL import Image
from small_qwen3_vl import original_network
from tiny import SIZES, VISUAL
from tiny_qwen3_vl import KINDS, tiny_qwen3_vl

from qwenvl_lit.api import QwenVL
from qwenvl_lit.data.readers.question import question_options
from qwenvl_lit.generation.attention_maps import AttentionMaps, chosen
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily

CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order
CONFIG = {  # 3 x 3 patches
    **SIZES,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "visual": {**VISUAL, "image_size": 24, "resampler_heads": 2},
}


def loaded(family) -> QwenVL:
    return QwenVL(
        family=family,
        model=family.load(),
        device=torch.device("cpu"),
        generation=Generation(max_new_tokens=5, min_new_tokens=5),
        read_options=question_options(),
    )


@pytest.fixture(scope="module")
def model() -> QwenVL:
    return loaded(QwenVLFamily(config=CONFIG, vocabulary="tiny"))


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


IMAGES = [picture(40, 24, 0), picture(96, 160, 1)]
QUESTION = "What is this?"


def prompt_of(model: QwenVL, maps: AttentionMaps):
    """The batch of the prompt, and the ids (1, T) up to the token before the last of the answer."""
    sample = model.processor.encode(maps.answer.prediction.conversation, prompt=True)
    ids = torch.cat([sample.input_ids, torch.tensor(maps.answer.ids[:-1])])[None]
    return model._batch([sample]), ids


def check_weights(maps: AttentionMaps, attentions, positions: torch.Tensor) -> None:
    """Compares weights of all layers (1, H, T, T) with those of the maps."""
    rows = torch.arange(-len(maps.tokens), 0)
    expected = torch.stack([weights[0][:, rows][:, :, positions] for weights in attentions])
    found = torch.cat([image.layer_weights for image in maps.images], dim=-1)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert expected.std() > 0.001  # not all equal


@torch.no_grad()
def test_maps_of_qwen_vl_are_the_weights_of_its_attention(model):
    maps = model.attend(IMAGES, QUESTION)
    assert maps.answer == model.chat([*IMAGES, QUESTION])[0]
    assert maps.answer.ids == model.chat([*IMAGES, QUESTION])[0].ids
    assert maps.tokens == tuple(model.processor.text([token]) for token in maps.answer.ids)
    assert (maps.layers, maps.heads, len(maps.tokens)) == ((0, 1), (0, 1), 5)
    batch, ids = prompt_of(model, maps)
    network, heads = model.model, {}
    attention = network.transformer.visual.attn_pool.attn
    inputs = model.family.inputs(batch, generate=True)
    hooks = []
    for name in ("q_proj", "k_proj"):
        projection = getattr(attention, name)
        hooks.append(
            projection.register_forward_hook(lambda m, i, out, n=name: heads.update({n: out}))
        )
    network.config._attn_implementation = "eager"
    try:
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        outputs = network(**inputs, output_attentions=True)
    finally:
        network.config._attn_implementation = "sdpa"
        for hook in hooks:
            hook.remove()
    check_weights(maps, outputs.attentions, batch.vision_positions)
    for index, image in enumerate(maps.images):
        scores = torch.zeros(2, 4, 9)
        for head, columns in enumerate((slice(16), slice(16, 32))):
            queries, keys = heads["q_proj"][:, columns], heads["k_proj"][index][:, columns]
            scores[head] = queries @ keys.T / 4
        expected = scores.softmax(-1).mean(0)
        torch.testing.assert_close(image.query_maps.flatten(1), expected, **CLOSE)
        answers = image.layer_weights.mean((0, 1)) @ expected
        torch.testing.assert_close(image.answer_maps.flatten(1), answers, **CLOSE)
        assert image.answer_maps.shape == (5, 3, 3)
        assert image.source.open().size == IMAGES[index].size


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_maps_without_resampler_are_the_weights_on_the_images_tokens(kind):
    model = loaded(tiny_qwen3_vl(kind))
    maps = model.attend(IMAGES, QUESTION)
    batch, ids = prompt_of(model, maps)
    original = original_network(model.model)
    original.set_attn_implementation("eager")
    sizes = batch.vision["image_sizes"]
    outputs = original(
        input_ids=ids,
        pixel_values=model.family.inputs(batch)["pixel_values"],
        image_grid_thw=torch.tensor([(1, *size) for size in sizes]),
        mm_token_type_ids=(ids == model.model.config.image_token_id).int(),
        output_attentions=True,
    )
    check_weights(maps, outputs.attentions, batch.vision_positions)
    for image, (height, width) in zip(maps.images, sizes, strict=True):
        assert image.query_maps is None
        assert image.answer_maps.shape == (5, height // 2, width // 2)
        flat = image.layer_weights.mean((0, 1))
        torch.testing.assert_close(image.answer_maps.flatten(1), flat)
    assert model.draw_attention(maps, image=1).height > 100
    with pytest.raises(ValueError, match="queries are those of a resampler, which this model"):
        model.draw_attention(maps, queries=[0])


def test_sums_are_one_for_queries_and_the_share_of_the_image_for_tokens(model):
    maps = model.attend(IMAGES, QUESTION)
    total = torch.zeros(5)
    for image in maps.images:
        torch.testing.assert_close(image.query_maps.sum((1, 2)), torch.ones(4))
        share = image.layer_weights.sum(-1).mean((0, 1))
        torch.testing.assert_close(image.answer_maps.sum((1, 2)), share)
        total += share
    assert ((total > 0) & (total < 1)).all()


def test_only_the_layers_and_heads_that_were_asked_for_are_kept(model):
    every = model.attend(IMAGES[0], QUESTION).images[0]
    maps = model.attend(IMAGES[0], QUESTION, layers=[-1], heads=(1,))
    assert (maps.layers, maps.heads) == ((1,), (1,))
    kept = maps.images[0].layer_weights
    assert kept.untyped_storage().nbytes() == 5 * 4 * 4  # tokens, queries, bytes
    torch.testing.assert_close(kept, every.layer_weights[1:, 1:])


def test_a_resampler_forced_to_one_patch_lights_up_there(model):
    attention = model.model.transformer.visual.attn_pool.attn

    def only_patch_5(module, inputs, keys):
        forced = torch.zeros_like(keys)
        forced[:, 5] = 100
        return forced

    hooks = [
        attention.q_proj.register_forward_hook(lambda module, inputs, out: torch.ones_like(out)),
        attention.k_proj.register_forward_hook(only_patch_5),
    ]
    try:
        maps = model.attend(IMAGES[0], QUESTION)
    finally:
        for hook in hooks:
            hook.remove()
    model.generation.release(model.model)  # features of the forced resampler
    [image] = maps.images
    peak = torch.zeros(3, 3)
    peak[1, 2] = 1
    torch.testing.assert_close(image.query_maps, peak.expand(4, 3, 3))
    shares = image.layer_weights.mean((0, 1)).sum(-1)
    torch.testing.assert_close(image.answer_maps, shares[:, None, None] * peak)
    drawing = model.draw_attention(maps, queries=[0])  # a panel of 289 x 174 pixels
    at_left, at_peak = drawing.getpixel((62, 125)), drawing.getpixel((255, 125))
    assert at_left[0] == at_left[1] == at_left[2]
    assert at_peak[0] > at_peak[2] + 50


def test_maps_are_relative_to_the_first_token_of_another_answer(model):
    maps = model.attend(IMAGES, QUESTION)
    general = model.attend(IMAGES, "Describe it.", max_new_tokens=1, min_new_tokens=1)
    relative = maps.relative_to(general)
    expected = maps.images[1].answer_maps / general.images[1].answer_maps[0]
    torch.testing.assert_close(relative.images[1].answer_maps, expected)
    assert relative.images[1].layer_weights is maps.images[1].layer_weights
    with pytest.raises(ValueError, match="about the same images"):
        maps.relative_to(model.attend(IMAGES[0], QUESTION))


def test_an_empty_answer_has_no_maps(model):
    stop = model.processor.stop_ids[0]
    only_stop = {
        "logits_processor": lambda ids, scores: scores.index_fill(1, torch.tensor([stop]), 1e4)
    }
    maps = model.attend(IMAGES[0], QUESTION, min_new_tokens=0, **only_stop)
    assert (maps.answer, maps.tokens) == ("", ())
    assert maps.images[0].answer_maps.shape == (0, 3, 3)
    with pytest.raises(ValueError, match="the answer is empty: there is nothing to draw"):
        model.draw_attention(maps)


@pytest.mark.parametrize("indices", [[2], [-3], [], [0, 0], [0, -2], "1", 1, [0.5], ["a"]])
def test_indices_that_do_not_exist_are_refused(indices):
    with pytest.raises(
        ValueError, match=r"^layers is a list of different numbers from 0 to 1, got"
    ):
        chosen("layers", indices, 2)


def test_mistakes_in_calls_are_named(model, tmp_path, monkeypatch):
    maps = model.attend(IMAGES[0], QUESTION)
    for call, message in (
        (lambda: model.attend([], QUESTION), "attend takes one or more images, got none"),
        (lambda: model.attend(IMAGES[0], QUESTION, heads=[2]), "heads is a list of different"),
        (lambda: model.draw_attention(maps, tokens=[5]), "tokens is a list of different numbers"),
        (lambda: model.draw_attention(maps, image=1), "image is a list of different numbers"),
        (lambda: model.draw_attention(maps, tmp_path / "x.csv"), "the ending names the image form"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(TypeError, match="no setting 'layer'; did you mean layers"):
        model.attend(IMAGES[0], QUESTION, layer=[0])
    monkeypatch.setattr(model.model, "hf_device_map", {"a": 0, "b": "cpu"}, raising=False)
    with pytest.raises(ValueError, match="on a single device; load it without device_map"):
        model.attend(IMAGES[0], QUESTION)
