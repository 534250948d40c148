"""The estimate against literals and measured figures; nothing here has weights."""

import pytest
import torch
from small_network import small_config
from torch import nn

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.memory import (
    CONTEXT,
    GIB,
    SPARE,
    activations_of,
    blocks_to_recompute,
    estimate_memory,
)

SWIFT = LoRA(rank=8, alpha=32, dropout=0.05, targets=r"transformer\.h\.\d+\.attn\.c_attn")
META = torch.device("meta")


def network(adapter, config: QwenVLConfig | None = None, dtype=torch.bfloat16) -> nn.Module:
    with META:
        model = QwenVLForCausalLM(config or QwenVLConfig()).to(dtype)
    return adapter.apply(model, QwenVLFamily).train()


def rows(
    count: int, *, tokens: int = 320, targets: int = 16, side: int = 448, queries: int = 256
) -> dict[str, torch.Tensor]:
    """Rows of the benchmarks: one image each."""
    with META:
        ids = torch.zeros(count, tokens, dtype=torch.int64)
        positions, learned = (
            torch.zeros(count * many, dtype=torch.int64) for many in (queries, targets)
        )
        pixels = torch.zeros(count, 3, side, side)
    return {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": pixels,
        "vision_positions": positions,
        "target_positions": learned,
    }


def small(adapter, spread="one", cards=1, **options):
    inputs = rows(2, tokens=9, targets=3, side=16, queries=4)
    return estimate_memory(
        network(adapter, small_config(), **options),
        inputs,
        QwenVLFamily.components,
        spread=spread,
        cards=cards,
    )


def test_weights_gradients_and_states_are_counted():
    """All of a float32 network train but the resampler's table of positions, 4 x 32 numbers."""
    parameters = 4 * sum(tensor.numel() for tensor in network(Full(), small_config()).parameters())
    found = small(Full(), dtype=torch.float32)
    assert found.weights["embeddings"] == found.weights["head"] == 64 * 32 * 4
    assert found.weights["other"] == 32 * 4  # the last norm
    assert sum(found.weights.values()) == parameters + 4 * 4 * 32
    assert (found.gradients, found.states) == (parameters, 2 * parameters)
    halves = small(Full(), dtype=torch.float32, spread="sharded", cards=2)
    assert (
        2 * (sum(halves.weights.values()) + halves.gradients + halves.states)
        == sum(found.weights.values()) + 3 * parameters
    )


def test_adapters_are_float32_and_what_is_frozen_has_neither_gradients_nor_states():
    adapters = 2 * 4 * (8 * 32 + 96 * 8)  # two layers, A and B of each
    found = small(SWIFT)
    assert (found.gradients, found.states) == (adapters, 2 * adapters)


def test_activations_are_those_that_autograd_keeps():
    """Two linear layers keep their inputs, (5, 4) and (5, 8); the logits of (5, 3) and their gradient count twice in float32."""

    class Two(nn.Sequential):
        def forward(self, x):
            return type("Output", (), {"logits": super().forward(x)})()

    model = Two(nn.Linear(4, 8), nn.Linear(8, 3)).to(META)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: ((kwargs.pop("x").clone().requires_grad_(),), kwargs),
        with_kwargs=True,
    )
    assert (
        activations_of(model, {"x": torch.zeros(5, 4, device=META)}).bytes()
        == 4 * (5 * 4 + 5 * 8) + 2 * 4 * 5 * 3
    )


def test_checkpointing_and_short_rows_need_less():
    model = network(SWIFT, small_config(num_hidden_layers=8))
    large, small = (rows(count, tokens=30, targets=3, side=16, queries=4) for count in (8, 1))
    many, few = activations_of(model, large), activations_of(model, small)
    assert many.bytes(None) < many.bytes() / 3
    assert many.bytes() == pytest.approx(8 * few.bytes(), rel=0.2)
    sizes = [many.bytes(count) for count in range(1, 9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == many.bytes(None)
    assert many.bytes(None, compiled=True) - many.bytes(None) == 8 * (
        8 * 30 * 32 * 2
    )  # blocks of (8, 30, 32) in bfloat16


@pytest.mark.parametrize(
    ("adapter", "count", "options", "measured"),
    [
        (SWIFT, 1, {}, 18.28),
        (SWIFT, 8, {}, 19.26),
        (SWIFT, 8, {"spread": "replicated", "cards": 2}, 19.43),
        (SWIFT, 1, {"four_bits": True}, 6.78),
        (LoRA(rank=8, alpha=32, dropout=0.05, targets="all-linear"), 1, {}, 19.09),
        (Full(), 1, {"spread": "sharded", "cards": 2}, 42.24),
    ],
    ids=["lora", "lora, batch 8", "lora, batch 8, ddp", "qlora", "lora_all", "full, fsdp"],
)
def test_a_full_size_run_needs_what_was_measured(adapter, count, options, measured):
    """`peak_memory_gib` of benchmarks/train.json, on H100s with checkpointing."""
    found = estimate_memory(
        network(adapter), rows(count), QwenVLFamily.components, recomputed=None, **options
    )
    assert found.total / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("count", "measured"), [(1, 20.7), (8, 36.9)])
def test_without_checkpointing_it_is_near_what_the_original_code_needed(count, measured):
    """Whose blocks keep a little more."""
    assert estimate_memory(
        network(SWIFT), rows(count), QwenVLFamily.components
    ).total / GIB == pytest.approx(measured, rel=0.15)


def test_as_many_blocks_run_again_as_memory_asks():
    model, inputs = (
        network(SWIFT, small_config(num_hidden_layers=8)),
        rows(8, tokens=30, targets=3, side=16, queries=4),
    )
    options = {"four_bits": False, "spread": "one", "cards": 1}
    most, least = (
        estimate_memory(model, inputs, QwenVLFamily.components, recomputed=count).total * SPARE
        + CONTEXT
        for count in (0, None)
    )

    def chosen(room: float) -> list[str]:
        return blocks_to_recompute(model, inputs, QwenVLFamily.components, room, **options)

    assert chosen(most) == []
    some = chosen((most + least) / 2)
    assert some == [f"base_model.model.transformer.h.{layer}" for layer in range(len(some))]
    assert 2 < len(some) < 6
    assert (
        len(chosen(least)) == len(chosen(0)) == 8
    )  # and what else fails, fails with as little as there is
