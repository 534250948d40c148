"""FP8 matmuls: their values, how close they come, and the layers that use them."""

import weakref

import pytest
import torch
import torch.distributed as dist
from small_network import CLOSE, IMAGE, image_positions, images, small_network, text
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.float8 import (
    FP8,
    Float8Linear,
    check_device,
    emulated_matmul,
    quantize,
    scaled_matmul,
    to_float8,
)
from qwenvl_lit.types import DataError

CLOSE_IN_NORM = 0.05  # relative: both operands have three bits of mantissa
SIZES = {
    "hidden_size": 64,
    "kv_channels": 16,
    "intermediate_size": 192,
    "visual": {"width": 32, "output_dim": 64},
}
LORA = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")


def layer(bias: bool = True, dtype=torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(64, 96, bias=bias, dtype=dtype).requires_grad_(False)


def rows(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def test_values_a_power_of_two_apart_are_quantized_exactly_and_zeros_have_a_scale():
    x = torch.tensor([[0.75, -3.0], [0.0, 1.5]])
    quantized, scale = quantize(x)
    assert quantized.dtype == FP8
    torch.testing.assert_close(quantized.float() * scale, x)
    zeros, scale = quantize(torch.zeros(2, 2))
    assert not zeros.float().any()
    assert scale > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_input_gradients_are_products_of_quantized_tensors(dtype, bias):
    plain = layer(bias, dtype)
    float8 = Float8Linear(plain)
    weight = float8.weight.float() * float8.scale
    x = rows(2, 5, 64, dtype=dtype).requires_grad_()
    out = float8(x)
    gradient = rows(2, 5, 96, dtype=dtype)
    out.backward(gradient)
    x8, scale = quantize(x.detach())
    g8, gradient_scale = quantize(gradient)
    expected = x8.float() * scale @ weight.t() + (plain.bias.float() if bias else 0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out.float(), expected, **close)
    torch.testing.assert_close(x.grad.float(), g8.float() * gradient_scale @ weight, **close)
    assert out.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulation_equals_the_matmul_of_torch(dtype):
    """Torch has `_scaled_mm`, which GPUs use, for CPUs too."""
    operands = (*quantize(rows(5, 64)), *quantize(layer().weight.detach()))
    torch.testing.assert_close(emulated_matmul(*operands, dtype), scaled_matmul(*operands, dtype))


def test_outputs_and_gradients_are_close_to_those_of_the_layer():
    plain, x = layer(), rows(7, 64).requires_grad_()
    expected = plain(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    out = Float8Linear(plain)(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert relative_error(out, expected) < CLOSE_IN_NORM
    assert relative_error(gradient, expected_gradient) < 2 * CLOSE_IN_NORM  # two matmuls


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (3, 0, 64), (2, 3, 4, 64)])
def test_inputs_have_any_shape(shape):
    x = torch.zeros(shape).requires_grad_()
    out = Float8Linear(layer(bias=False))(x)
    assert out.shape == (*shape[:-1], 96)
    out.sum().backward()
    assert x.grad.shape == shape


def test_the_output_has_the_dtype_of_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Float8Linear(layer())(rows(3, 64)).dtype == torch.bfloat16


def test_layers_of_one_size_share_a_compiled_graph():
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda float8, x: float8(x), backend=graphs, fullgraph=True)
    for seed in (1, 2):
        float8, x = Float8Linear(layer(seed=seed)), rows(3, 64).requires_grad_()
        expected = float8(x)
        compiled = run(float8, x)
        torch.testing.assert_close(compiled, expected)
        (gradient,) = torch.autograd.grad(compiled.sum(), x)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(gradient, expected_gradient)
    assert graphs.frame_count == 1


def test_casts_and_moves_do_not_change_it():
    float8, x = Float8Linear(layer(bias=False)), rows(3, 64)
    expected = float8(x)
    float8.to(torch.bfloat16).to("cpu")
    assert torch.equal(float8(x), expected)
    addresses = {t.untyped_storage().data_ptr() for t in (float8.weight, float8.packed)}
    assert len(addresses) == 1  # no third copy of the weight


def test_ddp_can_broadcast_it_over_gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(64, 64), Float8Linear(layer()))
        model = nn.parallel.DistributedDataParallel(model)  # broadcasts all weights
        model(rows(3, 64)).sum().backward()
    finally:
        dist.destroy_process_group()


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]


def network(adapter) -> nn.Module:
    torch.manual_seed(0)
    return adapter.apply(small_network(**SIZES), QwenVLFamily).train()


def test_frozen_layers_are_replaced_and_adapters_train_on_them():
    model = network(LORA)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    parameters = sum(tensor.numel() for tensor in model.parameters())
    ids = torch.tensor([IMAGE + text(9)])
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": images(1),
        "vision_positions": image_positions(ids.tolist()),
    }
    expected = model(**inputs).loss
    count = to_float8(model, QwenVLFamily.components)
    # Two blocks of the tower, two of the language model, and the resampler
    assert count == len(replaced(model)) == 4 * 2 + 5 * 2 + 5
    assert type(model.get_output_embeddings()) is nn.Linear
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == trained
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    loss.backward()
    with_gradient = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert with_gradient == trained


def test_a_layer_is_freed_before_the_next_one_is_quantized(monkeypatch):
    model = nn.Sequential(*(layer() for _ in range(3)))
    weights = [weakref.ref(module.weight) for module in model]
    alive = []
    init = Float8Linear.__init__

    def count_and_init(self, layer):
        alive.append(sum(weight() is not None for weight in weights))
        init(self, layer)

    monkeypatch.setattr(Float8Linear, "__init__", count_and_init)
    assert to_float8(model, {}) == 3
    assert alive == [3, 2, 1]


def test_layers_whose_weight_an_adapter_reads_are_not_replaced():
    dora = LoRA(rank=2, alpha=4, dropout=0.0, targets=["c_attn"], options={"use_dora": True})
    model = network(dora)
    to_float8(model, QwenVLFamily.components)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert (kinds["base_layer"], kinds["w1"]) == (nn.Linear, Float8Linear)


def test_layers_whose_sizes_are_not_aligned_are_not_replaced():
    model = nn.Sequential(nn.Linear(64, 20), nn.Linear(20, 64), nn.Linear(64, 32))
    model.requires_grad_(False)
    expected = nn.Sequential(*model[:2])(rows(2, 64))
    assert to_float8(model, {}) == 1
    torch.testing.assert_close(nn.Sequential(*model[:2])(rows(2, 64)), expected, **CLOSE)


def test_a_model_without_frozen_layers_is_refused():
    message = "this model has none. Models with adapter=full and adapter=qlora have none; with "
    with pytest.raises(DataError, match=message):
        to_float8(network(Full()), QwenVLFamily.components)


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(
        DataError, match=r"\(compute capability 8.9 or higher\), which an A100 does not have"
    ):
        check_device(torch.device("cuda"))


def test_a_cpu_gives_a_warning(caplog):
    check_device(torch.device("cpu"))
    [warning] = caplog.messages
    assert warning.startswith("a CPU only emulates FP8 and is slower with it")


def test_components_can_be_excluded():
    model = network(LORA)
    to_float8(model, QwenVLFamily.components, exclude=("head", "vision", "resampler"))
    assert replaced(model)
    assert all("transformer.h." in name for name in replaced(model))


@pytest.mark.gpu
def test_on_a_gpu_it_gives_the_same_values_without_synchronizing():
    torch.manual_seed(0)
    # Long sums, which a GPU accumulates with less precision
    plain = nn.Linear(4096, 512, dtype=torch.bfloat16).requires_grad_(False).cuda()
    float8, x = Float8Linear(plain), rows(48, 4096, dtype=torch.bfloat16).cuda().requires_grad_()
    weight = float8.weight.float() * float8.scale
    gradient = rows(48, 512, dtype=torch.bfloat16).cuda()
    float8(x).backward(gradient)  # libraries initialize themselves
    x.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = float8(x)
        out.backward(gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x8, scale = quantize(x.detach())
    g8, gradient_scale = quantize(gradient)
    expected = x8.float() * scale @ weight.t() + plain.bias
    assert relative_error(out.float(), expected) < 0.01
    assert relative_error(x.grad.float(), g8.float() * gradient_scale @ weight) < 0.01
