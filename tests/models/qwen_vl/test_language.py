import math
from collections.abc import Iterator

import pytest
import torch
from small_network import small_network
from torch._dynamo.utils import counters
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention, silu

from qwenvl_lit.models.qwen_vl.language import (
    MLP,
    LanguageBlock,
    RMSNorm,
    attend_eagerly,
    has_segments_kernel,
    ntk_alpha,
    rotary_tables,
    rotate,
)


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(1, 1), (2047, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15)],
)
def test_dynamic_ntk_doubles_with_the_length(length, alpha):
    assert ntk_alpha(length, 2048) == alpha


def test_rotary_turns_channel_i_with_channel_i_plus_half():
    x = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 1, 4)
    turned = rotate(x, *rotary_tables(torch.tensor([[2]]), head_dim=4, base=10000)).flatten()
    torch.testing.assert_close(turned, torch.tensor([math.cos(2), 0, math.sin(2), 0]))


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 16)
    slots = torch.arange(100)[None]
    tables = rotary_tables(slots, head_dim=16, base=10000)
    qk = rotate(torch.stack((q, k)).view(1, 1, 2, 1, 16).expand(1, 100, 2, 1, 16), *tables)[
        0, :, :, 0
    ]
    scores = qk[:, 0] @ qk[:, 1].T
    torch.testing.assert_close(
        scores.diagonal(7), scores[0, 7].expand(93), atol=1e-5, rtol=0
    )  # float32 angles up to 100


def test_alpha_stretches_slow_channels_and_not_the_fastest():
    near = rotary_tables(torch.tensor([[1]]), head_dim=64, base=10000)[1].flatten().asin()
    far = rotary_tables(torch.tensor([[1]]), head_dim=64, base=10000, alpha=3)[1].flatten().asin()
    torch.testing.assert_close(near[0], far[0])
    torch.testing.assert_close(near[-1], far[-1] * 3)


def test_logn_scales_queries_above_the_length_of_training_and_no_keys():
    x = torch.ones(1, 40, 2, 1, 4)
    slots = torch.arange(40)[None]
    plain = rotate(x, *rotary_tables(slots, head_dim=4, base=10000))
    scaled = rotate(x, *rotary_tables(slots, head_dim=4, base=10000, logn_above=10))
    torch.testing.assert_close(scaled[:, :, 1], plain[:, :, 1])
    torch.testing.assert_close(scaled[:, :10, 0], plain[:, :10, 0])
    torch.testing.assert_close(scaled[:, 19, 0], plain[:, 19, 0] * math.log(20) / math.log(10))


def test_rotary_computes_in_float32_and_returns_what_it_got():
    x = torch.randn(1, 3, 2, 1, 8, dtype=torch.bfloat16)
    tables = rotary_tables(torch.tensor([[5, 900, 8000]]), head_dim=8, base=10000)
    assert rotate(x, *tables).dtype == torch.bfloat16
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


def test_rms_norm_is_float32_inside_and_casts_before_the_weight():
    norm = RMSNorm(256, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = 100 * torch.randn(5, 256).bfloat16()
    wide = x.float()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16() * norm.weight
    torch.testing.assert_close(
        norm(x), expected, atol=0, rtol=2**-7
    )  # one step of bfloat16: 1 / sqrt against rsqrt


def test_the_second_branch_of_the_mlp_is_the_gate():
    mlp, x = MLP(8, 16), torch.randn(2, 8)
    torch.testing.assert_close(mlp(x), mlp.c_proj(mlp.w1(x) * silu(mlp.w2(x))))


def test_eager_attention_is_the_fused_one():
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    out, weights = attend_eagerly(None, q, k, v, mask, scaling=8**-0.5)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(
        out, expected, atol=1e-6, rtol=0
    )  # float32, another order of summation
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))


# -- packed rows --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def varlen_on_cpu():
    """Torch's variable-length attention has kernels for GPUs alone. These are for the CPU: slow, and with the same arguments."""
    varlen._varlen_attn.register_kernel("cpu", _forward)
    varlen._varlen_attn_backward.register_kernel("cpu", _backward)


def _forward(query, key, value, bounds, _, longest, __, is_causal, scale, *more):
    out = torch.empty_like(query)
    for segment, _q, _k, v, weights in _segments(
        query, key, value, bounds, longest, is_causal, scale
    ):
        out[segment] = (weights @ v).transpose(0, 1)
    return out, query.new_zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad, query, key, value, out, lse, bounds, _, longest, __, is_causal, rng, scale, *more
):
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for segment, q, k, v, weights in _segments(
        query, key, value, bounds, longest, is_causal, scale
    ):
        g = grad[segment].transpose(0, 1)
        of_weights = g @ v.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        for whole, part in zip(
            grads, (of_scores @ k, of_scores.mT @ q, weights.mT @ g), strict=True
        ):
            whole[segment] = part.transpose(0, 1)
    return grads


def _segments(query, key, value, bounds, longest, is_causal, scale) -> Iterator[tuple]:
    """Each segment with its queries, keys and values, (H, T, K), and its weights (H, T, T)."""
    assert is_causal
    assert bounds.dtype == torch.int32
    assert bounds.diff().max() <= longest
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        yield (
            slice(start, stop),
            q,
            k,
            v,
            (q @ k.mT * scale).masked_fill(future, -math.inf).softmax(-1),
        )


def packed_row(lengths: list[int]) -> tuple[dict, dict]:
    """Arguments of a block for segments of these lengths, with a mask and with bounds."""
    rotary = rotary_tables(
        torch.cat([torch.arange(length) for length in lengths])[None], head_dim=8, base=10000
    )
    number = torch.tensor([place for place, length in enumerate(lengths) for _ in range(length)])
    mask = (number[:, None] == number) & torch.ones(
        len(number), len(number), dtype=torch.bool
    ).tril()
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return {"rotary": rotary, "attention_mask": mask[None, None]}, {
        "rotary": rotary,
        "segments": (bounds, 9),
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_in_segments_is_attention_with_their_mask(varlen_on_cpu, compiled):
    """Output and gradients; compiled in one graph, for all bounds of one shape."""
    block = small_network().transformer.h[0]
    compute = (
        torch.compile(block.compute, backend="aot_eager", fullgraph=True)
        if compiled
        else block.compute
    )
    torch._dynamo.reset()
    counters.clear()
    for lengths in ([9, 1, 5, 5, 0], [4, 9, 7, 0, 0], [2, 3, 4, 5, 6]):
        x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
        found, expected = (
            [*_outcome(compute, block, x, arguments)] for arguments in reversed(packed_row(lengths))
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == (
        2 if compiled else 0
    )  # with bounds, and with a mask


def _outcome(
    compute, block: LanguageBlock, x: torch.Tensor, arguments: dict
) -> Iterator[torch.Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = compute(x, **arguments)
    out.square().mean().backward()
    yield from (out.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters()))


def test_segments_have_a_kernel_on_gpus_alone():
    assert not has_segments_kernel(torch.zeros(1, dtype=torch.bfloat16))
