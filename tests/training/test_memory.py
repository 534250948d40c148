"""Memory estimates against literals and measured figures; no weights are loaded."""

import pytest
import torch
from small_network import small_config
from tiny import tiny_family
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.memory import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    GIB,
    activations_of,
    blocks_to_checkpoint,
    estimate_memory,
    images_with,
    training_inputs,
)

SWIFT = LoRA(rank=8, alpha=32, dropout=0.05, targets=r"transformer\.h\.\d+\.attn\.c_attn")
META = torch.device("meta")


def network(adapter, config: QwenVLConfig | None = None, dtype=torch.bfloat16) -> nn.Module:
    with META:
        model = QwenVLForCausalLM(config or QwenVLConfig(visual=QWEN_VL_VISUAL)).to(dtype)
    return adapter.apply(model, QwenVLFamily).train()


def rows(
    count: int, *, tokens: int = 320, targets: int = 16, side: int = 448, queries: int = 256
) -> dict[str, torch.Tensor]:
    """Rows of the benchmarks: one image each."""
    with META:
        ids = torch.zeros(count, tokens, dtype=torch.int64)
        return {
            "input_ids": ids,
            "labels": ids,
            "pixel_values": torch.zeros(count, 3, side, side),
            "vision_positions": torch.zeros(count * queries, dtype=torch.int64),
            "target_positions": torch.zeros(count * targets, dtype=torch.int64),
        }


def estimate_small(adapter, sharding="none", gpus=1, **options):
    inputs = rows(2, tokens=9, targets=3, side=16, queries=4)
    model = network(adapter, small_config(), **options)
    return estimate_memory(model, inputs, QwenVLFamily.components, sharding=sharding, gpus=gpus)


def test_weights_gradients_and_optimizer_states_are_counted():
    """All of a float32 network trains except the resampler's position table of 4 x 32."""
    trained = 4 * sum(tensor.numel() for tensor in network(Full(), small_config()).parameters())
    estimate = estimate_small(Full(), dtype=torch.float32)
    assert estimate.weights["embeddings"] == estimate.weights["head"] == 64 * 32 * 4
    assert estimate.weights["other"] == 32 * 4  # the last norm
    weights = sum(estimate.weights.values())
    assert weights == trained + 4 * 4 * 32
    assert (estimate.gradients, estimate.optimizer_states) == (trained, 2 * trained)
    half = estimate_small(Full(), dtype=torch.float32, sharding="fsdp", gpus=2)
    half_in_total = sum(half.weights.values()) + half.gradients + half.optimizer_states
    assert 2 * half_in_total == weights + 3 * trained


def test_adapters_are_float32_and_frozen_weights_have_no_gradients_or_optimizer_states():
    adapters = 2 * 4 * (8 * 32 + 96 * 8)  # two layers, A and B of each
    estimate = estimate_small(SWIFT)
    assert (estimate.gradients, estimate.optimizer_states) == (adapters, 2 * adapters)


def test_activations_are_those_that_autograd_saves():
    """Two linear layers save their inputs, (5, 4) and (5, 8).

    The logits (5, 3) and their gradient add twice their size in float32.
    """

    class Two(nn.Sequential):
        def forward(self, x):
            return type("Output", (), {"logits": super().forward(x)})()

    model = Two(nn.Linear(4, 8), nn.Linear(8, 3)).to(META)

    def to_positional(module, args, kwargs):
        return (kwargs.pop("x").clone().requires_grad_(),), kwargs

    model.register_forward_pre_hook(to_positional, with_kwargs=True)
    activations = activations_of(model, {"x": torch.zeros(5, 4, device=META)})
    assert activations.bytes() == 4 * (5 * 4 + 5 * 8) + 2 * 4 * 5 * 3


def attend(module, query, key, value, attention_mask, **kwargs):
    """As a family registers it: its own kernel, and torch's on the meta device."""
    assert query.is_meta, "the estimate computes nothing"
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), None


def test_attention_of_a_family_with_transformers_blocks_is_counted_as_fused(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "segments", attend)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            config = Qwen3VLTextConfig(
                hidden_size=16,
                intermediate_size=24,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                attn_implementation="segments",
            )
            self.block = Qwen3VLTextDecoderLayer(config, 0)

        def forward(self, x, nested):
            logits = self.block(hidden_states=x, position_embeddings=nested["angles"])
            return type("Output", (), {"logits": logits})()

    model = Network().to(META)
    saved = {}
    for length in (100, 200):
        angles = torch.zeros(1, length, 8, device=META)
        x = torch.zeros(1, length, 16, device=META)
        inputs = {"x": x, "nested": {"angles": (angles, angles)}}
        [block] = activations_of(model, inputs).blocks.values()
        assert block.input == length * 16 * 4
        saved[length] = block.total
    assert saved[200] == 2 * saved[100], "the weights of attention are not saved"


def test_images_of_the_estimate_have_as_many_tokens_as_those_of_the_rows():
    family = tiny_family(max_length=8)
    assert [images_with(family, tokens) for tokens in (0, 1, 4, 5, 12)] == [0, 1, 1, 2, 3]


def test_nested_inputs_are_on_the_meta_device(monkeypatch):
    family = tiny_family()
    inputs = family.inputs

    def nested(batch, **options):
        return {**inputs(batch, **options), "nested": {"a": (torch.ones(2), 3, [torch.ones(1)])}}

    monkeypatch.setattr(family, "inputs", nested)
    values = training_inputs(family, 1, tokens=64)
    first, number, [last] = values["nested"]["a"]
    assert first.is_meta
    assert last.is_meta
    assert number == 3
    assert all(value.is_meta for value in values.values() if isinstance(value, torch.Tensor))


def test_checkpointing_and_fewer_rows_need_less_memory():
    model = network(SWIFT, small_config(num_hidden_layers=8))
    eight_rows, one_row = (
        activations_of(model, rows(count, tokens=30, targets=3, side=16, queries=4))
        for count in (8, 1)
    )
    assert eight_rows.bytes(None) < eight_rows.bytes() / 3
    assert eight_rows.bytes() == pytest.approx(8 * one_row.bytes(), rel=0.2)
    sizes = [eight_rows.bytes(count) for count in range(1, 9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == eight_rows.bytes(None)
    attention_outputs = 8 * (8 * 30 * 32 * 2)  # of eight blocks, (8, 30, 32) in bfloat16
    assert eight_rows.bytes(None, compiled=True) - eight_rows.bytes(None) == attention_outputs


@pytest.mark.parametrize(
    ("adapter", "count", "options", "measured"),
    [
        (SWIFT, 1, {}, 18.28),
        (SWIFT, 8, {}, 19.26),
        (SWIFT, 8, {"sharding": "ddp", "gpus": 2}, 19.43),
        (SWIFT, 1, {"quantized": True}, 6.78),
        (LoRA(rank=8, alpha=32, dropout=0.05, targets="all-linear"), 1, {}, 19.09),
        (Full(), 1, {"sharding": "fsdp", "gpus": 2}, 42.24),
    ],
    ids=["lora", "lora, batch 8", "lora, batch 8, ddp", "qlora", "lora_all", "full, fsdp"],
)
def test_the_estimate_for_a_full_size_run_is_what_was_measured(adapter, count, options, measured):
    """`peak_memory_gib` of benchmarks/train.json, on H100s with checkpointing."""
    estimate = estimate_memory(
        network(adapter), rows(count), QwenVLFamily.components, checkpointed=None, **options
    )
    assert estimate.total / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("count", "measured"), [(1, 20.7), (8, 36.9)])
def test_without_checkpointing_the_estimate_is_near_the_memory_of_the_original_code(
    count, measured
):
    """The blocks of the original save a little more."""
    estimate = estimate_memory(network(SWIFT), rows(count), QwenVLFamily.components)
    assert estimate.total / GIB == pytest.approx(measured, rel=0.15)


def test_the_fewest_blocks_that_make_it_fit_are_checkpointed():
    model = network(SWIFT, small_config(num_hidden_layers=8))
    inputs = rows(8, tokens=30, targets=3, side=16, queries=4)

    def needed(checkpointed: int | None) -> float:
        estimate = estimate_memory(
            model, inputs, QwenVLFamily.components, checkpointed=checkpointed
        )
        return estimate.total * FRAGMENTATION + CUDA_CONTEXT

    def checkpointed_blocks(available: float) -> list[str]:
        options = {"quantized": False, "sharding": "none", "gpus": 1}
        return blocks_to_checkpoint(model, inputs, QwenVLFamily.components, available, **options)

    most, least = needed(0), needed(None)
    assert checkpointed_blocks(most) == []
    some = checkpointed_blocks((most + least) / 2)
    assert some == [f"base_model.model.transformer.h.{layer}" for layer in range(len(some))]
    assert 2 < len(some) < 6
    assert len(checkpointed_blocks(least)) == 8
    assert len(checkpointed_blocks(0)) == 8  # all of them, even if that is not enough


@pytest.mark.parametrize(
    ("max_length", "tokens", "images", "targets"),
    [
        (None, 512, 1, 64),
        (512, 512, 1, 64),
        (100, 100, 1, 64),
        (80, 80, 1, 49),  # a shorter answer
        (33, 33, 1, 2),
        (32, 32, 0, 13),  # an image does not fit any more
        (5, 21, 0, 2),  # no row fits: the shortest
    ],
)
@pytest.mark.parametrize("too_long", ["error", "drop", "truncate_left"])
def test_the_estimate_is_for_a_row_that_max_length_allows(
    max_length, tokens, images, targets, too_long
):
    family = tiny_family(max_length=max_length, too_long=too_long)
    inputs = training_inputs(family, 2, tokens=512, targets=64)
    assert inputs["input_ids"].shape == (2, tokens)
    assert len(inputs.get("vision_positions", ())) == 2 * images * 4
    assert len(inputs["target_positions"]) == 2 * targets
