"""The networks against transformers' own forward."""

import pytest
import torch
from small_qwen3_vl import (
    CLOSE,
    KINDS,
    PROMPTS,
    for_transformers,
    original_network,
    packed,
    padded,
    prompt,
    small_config,
    small_network,
    with_targets,
)
from torch import nn

from qwenvl_lit.models.qwen3_vl.network import NETWORKS, image_features
from qwenvl_lit.models.qwen3_vl.tower import image_tokens
from qwenvl_lit.training.memory import activations_of
from qwenvl_lit.training.speed import checkpoint_blocks

LOSS = {"rtol": 1e-5, "atol": 0}
TEXTS = (prompt(6, seed=1), prompt(9, seed=2))


@pytest.fixture(params=KINDS)
def network(request) -> nn.Module:
    return small_network(request.param)


# -- logits and losses -----------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [PROMPTS, TEXTS], ids=["images", "texts"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_and_the_loss_of_transformers(network, prompts, side):
    inputs = padded(prompts, network.config, side=side)
    expected = original_network(network)(**for_transformers(inputs))
    result = network(**inputs)
    tokens = inputs["attention_mask"].bool()
    torch.testing.assert_close(result.logits[tokens], expected.logits[tokens], **CLOSE)
    torch.testing.assert_close(result.loss, expected.loss, **LOSS)


@pytest.mark.parametrize("prompts", [PROMPTS, TEXTS], ids=["images", "texts"])
def test_samples_have_the_same_logits_packed_right_padded_without_a_mask_and_alone(
    network, prompts
):
    rows = padded(prompts, network.config)
    tokens = rows.pop("attention_mask").bool()
    in_rows = network(**rows)
    in_one_row = network(**packed(prompts, network.config))
    logits = in_rows.logits[tokens]
    torch.testing.assert_close(in_one_row.logits[0, : len(logits)], logits, **CLOSE)
    torch.testing.assert_close(in_one_row.loss, in_rows.loss, **LOSS)
    alone = [network(**padded([one], network.config)).logits[0] for one in prompts]
    torch.testing.assert_close(torch.cat(alone), logits, **CLOSE)


@pytest.mark.parametrize("make", [padded, packed])
def test_logits_at_target_positions_are_the_same_and_so_is_the_loss(network, make):
    inputs = with_targets(make(PROMPTS, network.config))
    at_targets = network(**inputs)
    positions = inputs.pop("target_positions")
    everywhere = network(**inputs)
    expected = everywhere.logits.flatten(0, 1)[positions]
    torch.testing.assert_close(at_targets.logits, expected, **CLOSE)
    torch.testing.assert_close(at_targets.loss, everywhere.loss, **LOSS)
    halved = network(**inputs, target_positions=positions, num_items_in_batch=2 * len(positions))
    torch.testing.assert_close(halved.loss, everywhere.loss / 2, **LOSS)
    inputs |= {"logits_to_keep": 2, "labels": None}
    torch.testing.assert_close(network(**inputs).logits, everywhere.logits[:, -2:], **CLOSE)


def test_a_batch_without_a_supervised_token_is_refused(network):
    inputs = padded(TEXTS, network.config)
    with pytest.raises(ValueError, match="no token of this batch is supervised"):
        network(**inputs, target_positions=torch.empty(0, dtype=torch.int64))


# -- images ----------------------------------------------------------------------------------------


def test_features_take_the_place_of_pixels(network):
    inputs = padded(PROMPTS, network.config)
    expected = network(**inputs).logits
    features = image_features(network, inputs)
    sizes = inputs["image_sizes"]
    assert [len(one) for one in features] == image_tokens(sizes, network.config.vision_config)
    levels = {"qwen2_5_vl": 0, "qwen3_vl": 2}[network.config.model_type]
    assert {one.shape[1] for one in features} == {32 * (1 + levels)}
    without_pixels = {"vision_features": torch.cat(features)}
    for name, value in inputs.items():
        if name != "pixel_values" and not name.startswith("image_"):
            without_pixels[name] = value
    torch.testing.assert_close(network(**without_pixels).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="either pixel_values or vision_features"):
        network(**inputs, vision_features=torch.cat(features))
    without_pixels["vision_positions"] = inputs["vision_positions"][1:]
    with pytest.raises(ValueError, match=r"29 entries for 30 features"):
        network(**without_pixels)


def test_a_frozen_tower_saves_nothing_and_ignores_autocast(network):
    inputs = padded(PROMPTS, network.config)
    trained = network.train().encode_images(inputs["pixel_values"], inputs)
    assert trained.requires_grad
    for parameter in network.model.visual.parameters():
        parameter.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frozen = network.encode_images(inputs["pixel_values"], inputs)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, trained.detach(), **CLOSE)


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [padded, packed])
def test_every_parameter_gets_a_gradient(network, make):
    network.train()(**make(PROMPTS, network.config)).loss.backward()
    for name, parameter in network.named_parameters():
        if not name.endswith(("k_proj.bias", "k_norm.bias")):  # the softmax cancels these
            assert parameter.grad.abs().sum() > 0, name


def test_without_images_a_trained_tower_gets_gradients_of_zero(network):
    """Ranks with images would wait for them."""
    network.train()(**padded(TEXTS, network.config)).loss.backward()
    for name, parameter in network.model.visual.named_parameters():
        assert not parameter.grad.any(), name


def test_gradients_are_the_same_with_activation_checkpointing(network):
    inputs = with_targets(packed(PROMPTS, network.config))
    network.train()(**inputs).loss.backward()
    expected = {name: tensor.grad for name, tensor in network.named_parameters()}
    network.zero_grad()
    checkpoint_blocks(network)
    network(**inputs).loss.backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("prompts", [PROMPTS, TEXTS], ids=["images", "texts"])
def test_forward_asks_the_device_for_nothing(network, make, prompts):
    """The meta device has no values, so whatever would synchronize raises there."""
    inputs = with_targets(make(prompts, network.config))
    inputs.pop("attention_mask", None)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value.to("meta")
    network.train().to("meta")(**inputs, use_cache=False).loss.backward()
    activations = activations_of(network, inputs)
    blocks = 6 if prompts is PROMPTS else 3
    large = [block for block in activations.blocks.values() if block.input > 4 * 4 * 32 * 4]
    assert len(large) == blocks  # a text-only batch has an image of one token


# -- weights ---------------------------------------------------------------------------------------


def test_weights_load_under_the_published_names():
    """Checkpoints of Qwen2.5-VL have other names than the network; those of Qwen3-VL do not."""
    for kind in KINDS:
        network = small_network(kind)
        published = {}
        for name, tensor in network.state_dict().items():
            if kind == "qwen2_5_vl":
                name = name.replace("model.visual.", "visual.")
                name = name.replace("model.language_model.", "model.")
            published[name] = tensor
        loaded = NETWORKS[kind].from_pretrained(
            None, config=small_config(kind), state_dict=published
        )
        inputs = padded(PROMPTS, network.config)
        torch.testing.assert_close(loaded(**inputs).logits, network(**inputs).logits, **CLOSE)
        assert loaded.state_dict().keys() == original_network(network).state_dict().keys()


def test_modules_may_be_offloaded(network, tmp_path):
    network.save_pretrained(tmp_path / "model")
    offloaded = type(network).from_pretrained(
        tmp_path / "model",
        device_map={"model.visual": "disk", "model.language_model": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    assert offloaded.model.visual.patch_embed.proj.weight.is_meta
    inputs = padded(PROMPTS, network.config)
    torch.testing.assert_close(offloaded(**inputs).logits, network(**inputs).logits, **CLOSE)


# -- generation with transformers ------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_answers_as_transformers_does(network, beams):
    settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    settings |= {"pad_token_id": 0, "eos_token_id": 59, "use_cache": True}
    inputs = padded(PROMPTS, network.config, side="left")
    del inputs["labels"]
    expected = original_network(network).generate(**for_transformers(inputs), **settings)
    assert torch.equal(network.generate(**inputs, **settings), expected)
    inputs["vision_features"] = torch.cat(image_features(network, inputs))
    del inputs["pixel_values"]
    assert torch.equal(network.generate(**inputs, **settings), expected)
