import json
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from small_network import (
    CLOSE,
    GREEDY,
    IMAGE,
    IMG,
    IMG_END,
    IMG_PAD,
    LOSS,
    QUERIES,
    images,
    padded,
    small_config,
    small_network,
    talk_of_two,
    tensor,
    text,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM


@pytest.fixture
def model() -> QwenVLForCausalLM:
    return small_network()


@pytest.fixture
def talk() -> dict[str, torch.Tensor]:
    return talk_of_two()


# -- config and files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 40}, "hidden_size=40 must be num_attention_heads"),
        ({"kv_channels": 2, "num_attention_heads": 16}, "kv_channels=2 must be even and above 2"),
        ({"intermediate_size": 97}, "intermediate_size=97 must be even"),
        ({"attn_dropout_prob": 0.1}, "attn_dropout_prob=0.1 is not supported"),
        ({"vocab_size": 62}, "image_start_id=60 leaves no room"),
        ({"visual": {"image_size": 18}}, "image_size=18 must be a multiple of visual.patch_size=4"),
        ({"visual": {"heads": 3}}, "width=16 must be a multiple of visual.heads=3"),
        (
            {"visual": {"resampler_heads": 5}},
            "output_dim=32 must be a multiple of visual.resampler_heads=5",
        ),
        ({"visual": {"output_dim": 64}}, "output_dim=64 must be hidden_size=32"),
        ({"visual": {"n_queries": 5}}, "n_queries=5 must be a square number"),
        ({"visual": {"n_querys": 4}}, "unknown keys n_querys"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_a_tower_without_a_size_is_refused():
    with pytest.raises(ValueError, match="visual lacks patch_size, width"):
        QwenVLConfig(
            visual={
                "image_size": 448,
                "layers": 2,
                "heads": 2,
                "mlp_ratio": 2.0,
                "output_dim": 4096,
                "image_start_id": 1,
            }
        )


def test_config_files_keep_settings_that_the_config_does_not_declare(tmp_path):
    settings = small_config().to_dict() | {
        "bf16": True,
        "onnx_safe": None,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(settings | {"dtype": None}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, QwenVLConfig)
    assert config.dtype == torch.bfloat16
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["visual"] == settings["visual"]
    assert written["bf16"] is True
    assert written["model_type"] == "qwen"


def test_the_default_config_is_the_published_network():
    with torch.device("meta"):
        model = QwenVLForCausalLM(QwenVLConfig(visual=QWEN_VL_VISUAL))
    tensors = model.state_dict()
    assert len(tensors) == 853 + 4  # q, k, v of the resampler are one weight and one bias in files
    assert sum(tensor.numel() for tensor in tensors.values()) == 9_656_935_168
    assert model.transformer.visual.transformer["resblocks"][0].mlp.c_fc.out_features == 8192


def test_saved_and_loaded_weights_are_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    prefix = "transformer.visual.attn_pool.attn."
    resampler = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert resampler == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, QwenVLForCausalLM)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {name for name, tensor in loaded.named_parameters() if tensor.requires_grad} == trained


def test_a_tower_that_a_checkpoint_lacks_is_initialized(model, tmp_path):
    rest = {name: tensor for name, tensor in model.state_dict().items() if ".visual." not in name}
    model.save_pretrained(tmp_path, state_dict=rest)
    table = QwenVLForCausalLM.from_pretrained(tmp_path).transformer.visual.attn_pool.pos_embed
    torch.testing.assert_close(table, model.transformer.visual.attn_pool.pos_embed)


def test_weights_are_initialized_as_in_the_original():
    torch.manual_seed(0)
    visual = {"output_dim": 128, "width": 128, "mlp_ratio": 4.0}
    sizes = {"hidden_size": 128, "kv_channels": 32, "num_hidden_layers": 8}
    model = QwenVLForCausalLM(small_config(visual, **sizes, initializer_range=0.02))
    block, tower = model.transformer.h[0], model.transformer.visual
    deviations = {
        model.transformer.wte.weight: 0.02,
        block.attn.c_attn.weight: 0.02,
        block.attn.c_proj.weight: 0.02 / 4,
        block.mlp.c_proj.weight: 0.02 / 4,
        tower.transformer["resblocks"][0].mlp.c_proj.weight: 0.02 / 4,
        tower.transformer["resblocks"][0].attn.out_proj.weight: 0.02,
        tower.positional_embedding: 128**-0.5,
        tower.proj: 128**-0.5,
        tower.attn_pool.query: 0.02,
        tower.attn_pool.attn.k_proj.weight: (6 / 512 / 3) ** 0.5,
    }
    for weight, deviation in deviations.items():
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert not block.attn.c_attn.bias.any()
    assert (block.ln_1.weight == 1).all()


# -- images ----------------------------------------------------------------------------------------


def test_image_tokens_are_located_in_the_text(model, talk):
    expected = model(**talk).logits
    del talk["vision_positions"]
    assert torch.equal(model(**talk).logits, expected)


def test_image_features_may_be_computed_in_advance(model, talk):
    expected = model(**talk).logits
    features = model.get_image_features(talk.pop("pixel_values"))
    assert features.shape == (3, QUERIES, 32)
    torch.testing.assert_close(model(**talk, vision_features=features).logits, expected, **CLOSE)


def test_the_ids_between_the_image_tags_do_not_matter(model):
    ids = text(3) + IMAGE + text(5)
    other_ids = [7 if token_id == IMG_PAD else token_id for token_id in ids]
    logits = model(tensor(ids), pixel_values=images(1)).logits
    assert torch.equal(model(tensor(other_ids), pixel_values=images(1)).logits, logits)


def test_an_image_changes_only_later_tokens_of_its_own_row(model, talk):
    before = model(**talk).logits
    talk["pixel_values"][2] += 1  # the second image of the second row
    changed = (model(**talk).logits - before).abs().amax(-1) > 1e-3
    assert not changed[0].any()
    assert not changed[1, : len(IMAGE) + 2].any()
    assert changed[1, -4:].all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (text(4), "1 images, but the text has 0 <img> and 0 </img>"),
        (IMAGE + IMAGE, "1 images, but the text has 2 <img> and 2 </img>"),
        (
            [IMG, *[IMG_PAD] * 3, IMG_END],
            r"an image has 4 tokens, but the numbers of tokens between <img> and </img> are \[3\]",
        ),
        ([IMG_END, *[IMG_PAD] * 4, IMG], "an image has 4 tokens"),
    ],
)
def test_a_text_whose_image_tokens_do_not_match_the_images_is_refused(model, row, message):
    with pytest.raises(ValueError, match=message):
        model(tensor(row), pixel_values=images(1))


def test_contradictory_arguments_are_refused(model, talk):
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="give either pixel_values or vision_features"):
        model(**talk, vision_features=torch.zeros(3, QUERIES, 32))
    message = "vision_positions has 11 entries, but 3 images have 4 tokens each"
    with pytest.raises(ValueError, match=message):
        model(**talk | {"vision_positions": talk["vision_positions"][1:]})
    with pytest.raises(ValueError, match="inputs_embeds with images need vision_positions"):
        model(inputs_embeds=torch.zeros(1, 8, 32), pixel_values=images(1))


def test_images_are_ignored_after_the_prompt(model):
    ids, more = tensor(IMAGE + text(3)), tensor(IMAGE)
    caches = [model(ids, pixel_values=images(1)).past_key_values for _ in range(2)]
    expected = model(more, past_key_values=caches[0]).logits
    with_image = model(more, past_key_values=caches[1], pixel_values=images(1, seed=1)).logits
    assert torch.equal(with_image, expected)


# -- equivalences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_padding_does_not_change_the_logits_of_a_row(side, attn_implementation):
    model = small_network(attn_implementation=attn_implementation)
    rows = [text(3) + IMAGE + text(5), text(2, seed=1), IMAGE + text(9, seed=2)]
    alone = [
        model(tensor(rows[0]), pixel_values=images(2)[:1]),
        model(tensor(rows[1])),
        model(tensor(rows[2]), pixel_values=images(2)[1:]),
    ]
    filled, mask = padded(rows, side)
    logits = model(tensor(*filled), attention_mask=mask, pixel_values=images(2)).logits
    for row, kept, expected in zip(logits, mask.bool(), alone, strict=True):
        torch.testing.assert_close(row[kept], expected.logits[0], **CLOSE)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_row_of_padding_has_finite_logits_and_gradients(attn_implementation):
    model = small_network(attn_implementation=attn_implementation).train()
    ids = tensor(text(6), text(6, seed=1))
    mask = tensor([1] * 6, [0] * 6)
    out = model(ids, attention_mask=mask, labels=ids.where(mask.bool(), -100))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_fused_attention_equals_eager_attention(talk):
    fused, eager = small_network(), small_network(attn_implementation="eager")
    kept = talk["attention_mask"].bool()
    torch.testing.assert_close(fused(**talk).logits[kept], eager(**talk).logits[kept], **CLOSE)


def test_a_cache_does_not_change_the_logits(model):
    ids = tensor(text(3) + IMAGE + text(12))
    whole = model(ids, pixel_values=images(1), use_cache=False)
    assert whole.past_key_values is None
    cache = model(ids[:, :12], pixel_values=images(1)).past_key_values
    steps = [model(token, past_key_values=cache).logits for token in ids[:, 12:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits[:, 12:], **CLOSE)


def test_logits_to_keep_counts_from_the_end_or_lists_indices(model):
    ids = tensor(text(9))
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:], **CLOSE)
    chosen = model(ids, logits_to_keep=torch.tensor([1, 5])).logits
    torch.testing.assert_close(chosen, logits[:, [1, 5]], **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_packing_does_not_change_the_logits_of_a_sample(training, attn_implementation):
    model = small_network(attn_implementation=attn_implementation).train(training)
    # Each below seq_length = 32, together above it.
    samples = [text(20), IMAGE + text(9, seed=1), text(13, seed=2)]
    packed = tensor([*chain.from_iterable(samples)])
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    out = model(packed, position_ids=positions, pixel_values=images(1))
    assert out.past_key_values is None
    alone = []
    for sample in samples:
        pixel_values = images(1) if IMG in sample else None
        alone.append(model(tensor(sample), pixel_values=pixel_values).logits)
    torch.testing.assert_close(out.logits, torch.cat(alone, dim=1), **CLOSE)


def test_position_ids_of_a_single_sample_equal_the_default_positions(model):
    ids = tensor(text(50))  # above seq_length = 32: dynamic NTK and log-n
    positions = torch.arange(50)[None]
    logits = model(ids, position_ids=positions).logits
    torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


def test_the_loss_at_target_positions_is_the_loss_of_all_positions(model, talk):
    ids = talk["input_ids"]
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    labels = ids.where(drawn < 0.4, -100)
    labels[:, 0] = 5  # ignored: no token precedes it
    next_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    targets = (next_labels != -100).flatten().nonzero().squeeze(1)
    model.train()
    whole = model(**talk, labels=labels)
    targeted = model(**talk, labels=labels, target_positions=targets)
    assert targeted.logits.shape == (len(targets), 64)
    torch.testing.assert_close(targeted.logits, whole.logits.flatten(0, 1)[targets], **CLOSE)
    torch.testing.assert_close(targeted.loss, whole.loss, **LOSS)
    expected = nn.functional.cross_entropy(targeted.logits, labels.flatten()[targets + 1])
    torch.testing.assert_close(targeted.loss, expected, **LOSS)


def test_the_loss_is_float32_in_a_bfloat16_model(model):
    ids = tensor(text(8))
    out = model.bfloat16()(ids, labels=ids, target_positions=torch.tensor([3, 4]))
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32


def test_mixed_precision_trains(model, talk):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**talk, labels=talk["input_ids"]).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_without_supervised_tokens_is_refused(model):
    ids = tensor(text(8))
    with pytest.raises(ValueError, match="no token of this batch is supervised"):
        model(ids, labels=ids, target_positions=torch.tensor([], dtype=torch.int64))


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_hidden_states_and_attentions_are_returned_on_request(talk):
    model = small_network(attn_implementation="eager")
    out = model(**talk, output_hidden_states=True, output_attentions=True)
    length = talk["input_ids"].shape[1]
    assert [states.shape for states in out.hidden_states] == [(2, length, 32)] * 3
    assert [weights.shape for weights in out.attentions] == [(2, 4, length, length)] * 2


# -- training --------------------------------------------------------------------------------------


def test_a_batch_without_images_reaches_the_tower_with_zero_gradients(model):
    ids = tensor(text(8))
    by_name = gradients(model.train(), {"input_ids": ids})
    assert by_name.keys() == {name for name, _ in model.named_parameters()}
    assert not any(gradient.any() for name, gradient in by_name.items() if ".visual." in name)
    torch.testing.assert_close(model(ids).logits, model.eval()(ids).logits, **CLOSE)


def test_a_training_step_does_not_synchronize(model):
    ids = tensor(IMAGE + text(8))
    batch = {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": images(1),
        "vision_positions": torch.arange(1, 1 + QUERIES),
    }
    batch["target_positions"] = torch.arange(8, 13)
    batch = {name: value.to("meta") for name, value in batch.items()}  # reading a value fails there
    model.to("meta").train()(**batch).loss.backward()


def test_a_frozen_tower_is_not_run_without_images(model):
    model.train().transformer.visual.requires_grad_(False)
    model.transformer.visual.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    model(tensor(text(8)))
    no_positions = torch.tensor([], dtype=torch.int64)
    model(tensor(text(8)), pixel_values=images(0), vision_positions=no_positions)


def test_the_positions_of_the_resampler_are_a_buffer(model):
    assert "transformer.visual.attn_pool.pos_embed" in model.state_dict()
    assert not any("pos_embed" in name for name, _ in model.named_parameters())


def test_adapters_reach_every_linear_layer(model, talk, tmp_path):
    peft = pytest.importorskip("peft")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear.remove("lm_head")
    assert {name.rpartition(".")[2] for name in linear} == {
        *("c_attn", "c_proj", "w1", "w2"),
        *("in_proj", "out_proj", "c_fc", "kv_proj", "q_proj", "k_proj", "v_proj"),
    }
    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).train()
    adapted(**talk, labels=talk["input_ids"]).loss.backward()
    reached = set()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any(), name
            reached.add(name.removeprefix("base_model.model.").partition(".lora")[0])
    assert reached == linear

    expected = adapted.eval()(**talk).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(small_network(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**talk).logits, expected, **CLOSE)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = QwenVLForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**talk).logits, expected, **CLOSE)
    assert torch.equal(adapted.generate(**talk, **GREEDY), merged.generate(**talk, **GREEDY))
