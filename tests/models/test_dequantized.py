"""4-bit layers multiply with the same weights, dequantized, while many rows are answered."""

import sys
import weakref
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from small_network import CLOSE, images, padded, small_network, tensor, text
from torch import nn
from torch.nn.functional import linear

from qwenvl_lit.models import static_decoder as decoding
from qwenvl_lit.models.dequantized import (
    DequantizedWeights,
    dequantized_bytes,
    four_bit_layers,
    free_bytes,
)
from qwenvl_lit.models.qwen_vl.decoder import Decoder

SCALE = 0.25  # between two values of a weight


@dataclass
class QuantState:
    dtype: torch.dtype


class Linear4bit(nn.Linear):
    """Stands for the layer of bitsandbytes, which needs a GPU."""

    calls = 0

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype | None = torch.float32):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.bias = layer.bias
        codes = (layer.weight.detach() / SCALE).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.quant_state = QuantState(torch.bfloat16)
        self.compute_dtype = compute_dtype

    def forward(self, x):
        Linear4bit.calls += 1
        return linear(x, dequantize_4bit(self.weight, QuantState(x.dtype)), self.bias)


def dequantize_4bit(weight, state):
    return weight.to(state.dtype) * SCALE


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch):
    package = ModuleType("bitsandbytes")
    package.nn = SimpleNamespace(Linear4bit=Linear4bit)
    package.functional = SimpleNamespace(dequantize_4bit=dequantize_4bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", package.nn)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", package.functional)
    monkeypatch.setattr(Linear4bit, "calls", 0)


class Adapted(nn.Module):
    """A layer inside an adapter, as peft wraps it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x) + 1


@pytest.fixture
def layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        Linear4bit(nn.Linear(8, 16)),
        nn.Linear(16, 16),
        Adapted(Linear4bit(nn.Linear(16, 4, bias=False))),
        Linear4bit(nn.Linear(4, 4), compute_dtype=None),  # has not been called yet
    )
    model.is_loaded_in_4bit = True
    return model


def test_dequantized_layers_compute_the_same_until_they_are_released(layers):
    x = torch.randn(5, 8)
    expected, names = layers(x), list(layers.state_dict())
    assert Linear4bit.calls == 3
    found = four_bit_layers(layers, layers)
    assert found == [layers[0], layers[2].base_layer]
    assert dequantized_bytes(found) == (8 * 16 + 16 * 4) * 4
    dequantized = DequantizedWeights(found)
    assert torch.equal(layers(x), expected)
    assert Linear4bit.calls == 4  # the last layer only
    assert list(layers.state_dict()) == names
    dequantized.release()
    assert torch.equal(layers(x), expected)
    assert Linear4bit.calls == 7
    assert not [name for layer in found for name in vars(layer) if "dequantized" in name]


def test_weights_that_nobody_holds_are_freed(layers):
    found = four_bit_layers(layers, layers)
    dequantized = DequantizedWeights(found)
    weight = weakref.ref(found[0].dequantized_weight)
    del dequantized
    assert weight() is None
    assert layers(torch.ones(1, 8)).shape == (1, 4)
    assert Linear4bit.calls == 3


def test_weights_that_do_not_fit_leave_the_layers_as_they_were(layers, monkeypatch):
    found = four_bit_layers(layers, layers)

    def fails(weight, state):
        if weight.shape == found[1].weight.shape:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dequantize_4bit(weight, state)

    monkeypatch.setattr(sys.modules["bitsandbytes"].functional, "dequantize_4bit", fails)
    with pytest.raises(torch.OutOfMemoryError):
        DequantizedWeights(found)
    assert "forward" not in vars(found[0])


def test_layers_compute_in_their_own_precision_under_autocast_and_pass_gradients_on(layers):
    x = torch.randn(5, 8, requires_grad=True)
    found = four_bit_layers(layers, layers)
    with torch.inference_mode():
        dequantized = DequantizedWeights(found)
    with torch.autocast("cpu", torch.bfloat16):
        answer = found[0](x)
    assert answer.dtype == torch.float32
    answer.sum().backward()
    assert x.grad is not None
    dequantized.release()


def test_models_without_4_bit_layers_have_none():
    model = nn.Sequential(nn.Linear(2, 2))
    assert four_bit_layers(model, model) == []
    assert free_bytes(torch.device("cpu")) == 0


# -- the decoder -----------------------------------------------------------------------------------


@pytest.fixture
def network():
    network = small_network()
    for block in network.transformer.h:
        for parent, name in ((block.attn, "c_attn"), (block.mlp, "w1"), (block.mlp, "c_proj")):
            setattr(parent, name, Linear4bit(getattr(parent, name)))
    network.is_loaded_in_4bit = True
    return network


def answer(decoder, rows: int) -> torch.Tensor:
    """The logits of the first two new tokens of `rows` rows."""
    ids, mask = padded([text(5, seed=row) for row in range(rows)], side="left")
    inputs = {"input_ids": tensor(*ids), "attention_mask": mask, "pixel_values": images(0)}
    with torch.inference_mode():
        first = decoder.start(inputs, new_tokens=2)
        return torch.stack((first, decoder.step(first.argmax(-1))))


def test_four_rows_are_answered_with_dequantized_weights_and_so_are_later_ones(
    network, monkeypatch, caplog
):
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**30)
    decoding._log_dequantized.cache_clear()
    expected = answer(Decoder(network), 3)
    decoder = Decoder(network)
    answer(decoder, 3)
    assert decoder.dequantized is None
    calls = Linear4bit.calls
    with caplog.at_level("INFO"):
        answer(decoder, 4)
        torch.testing.assert_close(answer(decoder, 3), expected, **CLOSE)
    assert Linear4bit.calls == calls
    [message] = caplog.messages
    assert message.endswith("while batches are answered, which takes 0.0 GiB")
    del decoder
    answer(Decoder(network), 1)
    assert Linear4bit.calls > calls


def test_graphs_that_read_4_bit_weights_are_deleted(network, monkeypatch):
    decoder = Decoder(network)
    answer(decoder, 4)
    few = decoder.running_rows(rows=2, slots=8)
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**30)
    for expected in (0, 1):
        for graphs in (decoder.graphs, few.graphs):
            graphs.captured[1, 8] = (None, None)
        answer(decoder, 4)
        assert len(decoder.graphs.captured) == len(few.graphs.captured) == expected


def test_four_running_rows_multiply_with_dequantized_weights(network, monkeypatch):
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**30)
    decoder = Decoder(network)
    decoder.running_rows(rows=3, slots=8)
    assert decoder.dequantized is None
    decoder.running_rows(rows=4, slots=8)
    assert decoder.dequantized is not None


@pytest.mark.parametrize("share", [1.9, 2.1])
def test_dequantized_weights_take_at_most_half_of_the_free_memory(network, monkeypatch, share):
    size = dequantized_bytes(four_bit_layers(network, network.transformer.h))
    monkeypatch.setattr(decoding, "free_bytes", lambda device: share * size)
    decoder = Decoder(network)
    answer(decoder, 4)
    assert (decoder.dequantized is not None) == (share > 2)


def test_blocks_with_dequantized_weights_share_a_compiled_graph(network):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    torch._dynamo.reset()
    compute = torch.compile(lambda mlp, x: mlp(x), backend=counter, fullgraph=True)
    dequantized = DequantizedWeights(four_bit_layers(network, network))
    x = torch.randn(3, network.config.hidden_size)
    with torch.inference_mode():
        for block in network.transformer.h:
            torch.testing.assert_close(compute(block.mlp, x), block.mlp(x))
    assert counter.frame_count == 1
    dequantized.release()


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_multiplies_with_the_dequantized_weights(monkeypatch, double):
    for name in ("bitsandbytes", "bitsandbytes.nn", "bitsandbytes.functional"):
        monkeypatch.delitem(sys.modules, name)
    real = pytest.importorskip("bitsandbytes")
    options = {"compute_dtype": torch.bfloat16, "compress_statistics": double, "quant_type": "nf4"}
    layer = real.nn.Linear4bit(512, 256, **options).cuda()
    model = nn.Sequential(layer)
    model.is_loaded_in_4bit = True
    x = torch.randn(8, 512, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        expected = layer(x)
        dequantized = DequantizedWeights(four_bit_layers(model, model))
        torch.testing.assert_close(layer(x), expected, atol=0.02, rtol=0.02)
    dequantized.release()
