"""Products of 8 bits: what they are, how near they come, and who gets them."""

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
    FORMAT,
    Float8Linear,
    check_device,
    plain_product,
    rounded,
    scaled_product,
    to_float8,
)
from qwenvl_lit.types import DataError

NEAR = 0.05  # of the norm: three bits of mantissa in both factors
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


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def test_rounding_keeps_the_largest_and_gives_the_scale_back():
    x = torch.tensor([[0.75, -3.0], [0.0, 1.5]])
    packed, scale = rounded(x)
    assert packed.dtype == FORMAT
    torch.testing.assert_close(packed.float() * scale, x)  # powers of two apart
    zeros, scale = rounded(torch.zeros(2, 2))
    assert not zeros.float().any()
    assert scale > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_multiplies_what_was_rounded_in_both_directions(dtype, bias):
    plain = layer(bias, dtype)
    packed = Float8Linear(plain)
    weight = packed.weight.float() * packed.scale
    x = rows(2, 5, 64, dtype=dtype).requires_grad_()
    out = packed(x)
    gradient = rows(2, 5, 96, dtype=dtype)
    out.backward(gradient)
    x8, scale = rounded(x.detach())
    g8, gradient_scale = rounded(gradient)
    expected = x8.float() * scale @ weight.t() + (plain.bias.float() if bias else 0)
    precision = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(out.float(), expected, **precision)
    torch.testing.assert_close(x.grad.float(), g8.float() * gradient_scale @ weight, **precision)
    assert out.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_computes_what_a_gpu_does(dtype):
    factors = (*rounded(rows(5, 64)), *rounded(layer().weight.detach()))
    torch.testing.assert_close(
        plain_product(*factors, dtype), scaled_product(*factors, dtype)
    )  # which torch has on both


def test_it_comes_near_the_layer():
    plain, x = layer(), rows(7, 64).requires_grad_()
    expected = plain(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    found = Float8Linear(plain)(x)
    assert off(found, expected) < NEAR
    assert (
        off(torch.autograd.grad(found.square().sum(), x)[0], gradient) < 2 * NEAR
    )  # of a product of two


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (3, 0, 64), (2, 3, 4, 64)])
def test_rows_of_any_shape(shape):
    x = torch.zeros(shape).requires_grad_()
    out = Float8Linear(layer(bias=False))(x)
    assert out.shape == (*shape[:-1], 96)
    out.sum().backward()
    assert x.grad.shape == shape


def test_the_output_has_the_type_that_autocast_asks():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Float8Linear(layer())(rows(3, 64)).dtype == torch.bfloat16


def test_it_compiles_in_one_graph_for_layers_alike():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compute = torch.compile(lambda packed, x: packed(x), backend=graphs, fullgraph=True)
    for seed in (1, 2):
        packed, x = Float8Linear(layer(seed=seed)), rows(3, 64).requires_grad_()
        expected = packed(x)
        found = compute(packed, x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x)
        )
    assert graphs.frame_count == 1


def test_casts_and_moves_leave_it_as_it_is():
    packed, x = Float8Linear(layer(bias=False)), rows(3, 64)
    expected = packed(x)
    packed.to(torch.bfloat16).to("cpu")
    assert torch.equal(packed(x), expected)
    assert (
        packed.weight.untyped_storage().data_ptr() == packed.packed.untyped_storage().data_ptr()
    )  # no third copy


def test_processes_can_share_it():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(
            nn.Sequential(nn.Linear(64, 64), Float8Linear(layer()))
        )  # sends all weights around
        model(rows(3, 64)).sum().backward()
    finally:
        dist.destroy_process_group()


def network(adapter) -> nn.Module:
    torch.manual_seed(0)
    return adapter.apply(small_network(**SIZES), QwenVLFamily).train()


def test_frozen_layers_are_replaced_and_adapters_learn_on_them():
    model = network(LORA)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    numbers = sum(tensor.numel() for tensor in model.parameters())
    ids = torch.tensor([IMAGE + text(9)])
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": images(1),
        "vision_positions": image_positions(ids.tolist()),
    }
    expected = model(**inputs).loss
    count = to_float8(model, QwenVLFamily.components)
    packed = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert (
        count == len(packed) == 4 * 2 + 5 * 2 + 5
    )  # of two blocks of the tower, two of the language model, and of the resampler
    assert type(model.get_output_embeddings()) is nn.Linear
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == trained
    assert sum(tensor.numel() for tensor in model.parameters()) == numbers
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    loss.backward()
    given = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert given == trained


def test_before_a_layer_goes_the_next_one_is_not_made(monkeypatch):
    model = nn.Sequential(*(layer() for _ in range(3)))
    before = [weakref.ref(module.weight) for module in model]
    alive = []
    made = Float8Linear.__init__
    monkeypatch.setattr(
        Float8Linear,
        "__init__",
        lambda *args: (alive.append(sum(ref() is not None for ref in before)), made(*args))[1],
    )
    assert to_float8(model, {}) == 3
    assert alive == [3, 2, 1]


def test_layers_that_an_adapter_looks_at_stay_as_they_are():
    model = network(
        LoRA(rank=2, alpha=4, dropout=0.0, targets=["c_attn"], options={"use_dora": True})
    )
    to_float8(model, QwenVLFamily.components)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert (kinds["base_layer"], kinds["w1"]) == (nn.Linear, Float8Linear)


def test_layers_whose_sizes_do_not_fit_stay_as_they_are():
    model = nn.Sequential(nn.Linear(64, 20), nn.Linear(20, 64), nn.Linear(64, 32)).requires_grad_(
        False
    )
    expected = nn.Sequential(*model[:2])(rows(2, 64))
    assert to_float8(model, {}) == 1
    torch.testing.assert_close(nn.Sequential(*model[:2])(rows(2, 64)), expected, **CLOSE)


def test_where_nothing_is_frozen_it_is_refused():
    with pytest.raises(
        DataError,
        match=r"there are none: not with adapter=full .*; adapter=lora leaves its base frozen",
    ):
        to_float8(network(Full()), QwenVLFamily.components)


def test_a_card_without_such_products_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(DataError, match="an A100 does not have"):
        check_device(torch.device("cuda"))


def test_a_cpu_says_that_it_is_for_a_try_only(caplog):
    check_device(torch.device("cpu"))
    [said] = caplog.messages
    assert said.startswith("a CPU only imitates the numbers of 8 bits")


def test_parts_may_stay_as_they_are():
    model = network(LORA)
    to_float8(model, QwenVLFamily.components, but=("head", "vision", "resampler"))
    packed = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert packed
    assert all("transformer.h." in name for name in packed)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_and_waits_for_nothing():
    torch.manual_seed(0)
    plain = (
        nn.Linear(4096, 512, dtype=torch.bfloat16).requires_grad_(False).cuda()
    )  # long sums, which a GPU adds up in few bits
    packed, x = Float8Linear(plain), rows(48, 4096, dtype=torch.bfloat16).cuda().requires_grad_()
    weight = packed.weight.float() * packed.scale
    gradient = rows(48, 512, dtype=torch.bfloat16).cuda()
    packed(x).backward(gradient)  # libraries set themselves up
    x.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = packed(x)
        out.backward(gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x8, scale = rounded(x.detach())
    g8, gradient_scale = rounded(gradient)
    assert off(out.float(), x8.float() * scale @ weight.t() + plain.bias) < 0.01
    assert off(x.grad.float(), g8.float() * gradient_scale @ weight) < 0.01
