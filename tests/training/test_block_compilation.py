"""Blocks of transformers' own models are compiled and checkpointed like those of Qwen-VL."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextDecoderLayer,
    Qwen3VLVisionBlock,
)

from qwenvl_lit.models.components import blocks_of
from qwenvl_lit.models.dynamo import compiled_graphs
from qwenvl_lit.training.block_compilation import compile_blocks
from qwenvl_lit.training.speed import Speed
from qwenvl_lit.types import DataError

TEXT = Qwen3VLTextConfig(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_hidden_layers=2,
    attn_implementation="sdpa",
)
VISION = Qwen3VLVisionConfig(
    hidden_size=16, intermediate_size=24, num_heads=2, depth=2, attn_implementation="sdpa"
)


class Pair(GradientCheckpointingLayer):
    """A block that takes and returns two tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden_states, other):
        return self.linear(hidden_states).tanh(), other + 1


class Network(nn.Module):
    """Blocks of a kind, called with their first argument by position or by name."""

    def __init__(self, kind: str, *, named: bool):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.named = kind, named
        make = {
            "text": lambda index: Qwen3VLTextDecoderLayer(TEXT, index),
            "vision": lambda index: Qwen3VLVisionBlock(VISION),
            "pair": lambda index: Pair(),
        }
        self.blocks = nn.ModuleList(map(make[kind], range(2)))

    def forward(self, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(size)
        shape = {"text": (1, size, 16), "vision": (size, 16), "pair": (2, size, 16)}[self.kind]
        x = torch.randn(shape, generator=generator)
        angles = torch.randn(*shape[:-1], 8, generator=generator)
        others = {"position_embeddings": (angles.cos(), angles.sin())}
        if self.kind == "vision":
            others["cu_seqlens"] = torch.tensor([0, *range(4, size, 4), size], dtype=torch.int32)
        if self.kind == "pair":
            others = {"other": torch.ones(3)}
        for block in self.blocks:
            x = block(hidden_states=x, **others) if self.named else block(x, **others)
            if self.kind == "pair":
                x, others["other"] = x
        return x.square().mean() + others.get("other", torch.zeros(1)).mean()


def gradients(network: Network, size: int) -> list[torch.Tensor]:
    network.zero_grad()
    network(size).backward()
    return [tensor.grad.clone() for tensor in network.parameters()]


@pytest.fixture
def graphs(monkeypatch):
    """Captures and differentiates graphs, without kernels, and counts them."""
    torch.compiler.reset()
    torch_compile = torch.compile
    options = {"backend": "aot_eager"}
    monkeypatch.setattr(
        torch, "compile", lambda function, **given: torch_compile(function, **given, **options)
    )
    before = compiled_graphs()
    return lambda: compiled_graphs() - before


@pytest.mark.parametrize("named", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("kind", ["text", "vision", "pair"])
def test_compiled_blocks_of_transformers_give_the_same_gradients(kind, checkpointed, named, graphs):
    network = Network(kind, named=named).train()
    expected = {size: gradients(network, size) for size in (9, 13, 22)}
    for block in network.blocks:
        block.gradient_checkpointing = checkpointed
    compile_blocks(network)
    for size, of_size in expected.items():
        for gradient, plain in zip(gradients(network, size), of_size, strict=True):
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
    assert graphs() > 0
    if kind != "vision":  # whose attention in transformers asks for the lengths of images
        assert graphs() == 1, "one graph serves all sizes and all blocks"


def test_hooks_of_a_compiled_block_run_outside_its_graph(graphs):
    """FSDP gathers and frees the weights of a block in such hooks."""
    network, calls = Network("text", named=False).train(), Counter()
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, args: calls.update(["before"]))
        block.register_forward_hook(lambda block, args, output: calls.update(["after"]))
        block.gradient_checkpointing = True
    compile_blocks(network)
    for _ in range(3):
        gradients(network, 9)
    assert calls == {"before": 6, "after": 6}, "the backward pass recomputes without them"
    assert graphs() == 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"compile": True}, r"^speed.compile=true concerns the blocks .* Linear has none .*=auto$"),
        ({"checkpointing": "full"}, r"^speed.checkpointing=full .* Linear has none"),
    ],
)
def test_a_choice_about_blocks_is_refused_for_a_network_without_any(choices, message):
    trainer = SimpleNamespace(
        strategy=SingleDeviceStrategy(device=torch.device("cpu")), datamodule=None
    )
    network, others = nn.Linear(2, 2), {"family": None, "adapter": None, "trainer": trainer}
    assert not blocks_of(network)
    with pytest.raises(DataError, match=message):
        Speed(**choices).apply(network, **others)
    Speed().apply(network, **others)
