import math
from collections.abc import Iterator

import pytest
import torch
from small_network import small_network
from torch._dynamo.utils import counters
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention, silu

from qwenvl_lit.models.qwen_vl.dynamic_ntk import ntk_alpha
from qwenvl_lit.models.qwen_vl.language import (
    MLP,
    LanguageBlock,
    RMSNorm,
    attend_eagerly,
    rotary_tables,
    rotate,
)
from qwenvl_lit.models.segments import has_segments_kernel


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(1, 1), (2047, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15)],
)
def test_dynamic_ntk_doubles_with_the_length(length, alpha):
    assert ntk_alpha(length, 2048) == alpha


def test_rotary_rotates_channel_i_with_channel_i_plus_half():
    x = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 1, 4)
    rotated = rotate(x, *rotary_tables(torch.tensor([[2]]), head_dim=4, base=10000)).flatten()
    torch.testing.assert_close(rotated, torch.tensor([math.cos(2), 0, math.sin(2), 0]))


def test_rotary_scores_depend_only_on_the_distance():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(100)[None]
    tables = rotary_tables(positions, head_dim=16, base=10000)
    everywhere = torch.stack((q, k)).view(1, 1, 2, 1, 16).expand(1, 100, 2, 1, 16)
    qk = rotate(everywhere, *tables)[0, :, :, 0]
    scores = qk[:, 0] @ qk[:, 1].T
    expected = scores[0, 7].expand(93)
    # The tolerance is that of float32 angles up to 100.
    torch.testing.assert_close(scores.diagonal(7), expected, atol=1e-5, rtol=0)


def test_alpha_stretches_the_slowest_channel_and_not_the_fastest():
    first_position = torch.tensor([[1]])
    _, sines = rotary_tables(first_position, head_dim=64, base=10000)
    _, stretched = rotary_tables(first_position, head_dim=64, base=10000, alpha=3)
    angles, stretched_angles = sines.flatten().asin(), stretched.flatten().asin()
    torch.testing.assert_close(angles[0], stretched_angles[0])
    torch.testing.assert_close(angles[-1], stretched_angles[-1] * 3)


def test_logn_scales_queries_above_the_training_length_and_no_keys():
    x = torch.ones(1, 40, 2, 1, 4)
    positions = torch.arange(40)[None]
    plain = rotate(x, *rotary_tables(positions, head_dim=4, base=10000))
    scaled = rotate(x, *rotary_tables(positions, head_dim=4, base=10000, logn_above=10))
    torch.testing.assert_close(scaled[:, :, 1], plain[:, :, 1])
    torch.testing.assert_close(scaled[:, :10, 0], plain[:, :10, 0])
    torch.testing.assert_close(scaled[:, 19, 0], plain[:, 19, 0] * math.log(20) / math.log(10))


def test_rotary_computes_in_float32_and_returns_the_dtype_of_its_input():
    x = torch.randn(1, 3, 2, 1, 8, dtype=torch.bfloat16)
    tables = rotary_tables(torch.tensor([[5, 900, 8000]]), head_dim=8, base=10000)
    assert rotate(x, *tables).dtype == torch.bfloat16
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


def test_rms_norm_computes_in_float32_and_casts_before_the_weight():
    norm = RMSNorm(256, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = 100 * torch.randn(5, 256).bfloat16()
    wide = x.float()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16() * norm.weight
    one_step = 2**-7  # of bfloat16: 1 / sqrt against rsqrt
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=one_step)


def test_the_second_branch_of_the_mlp_is_the_gate():
    mlp, x = MLP(8, 16), torch.randn(2, 8)
    torch.testing.assert_close(mlp(x), mlp.c_proj(mlp.w1(x) * silu(mlp.w2(x))))


def test_eager_attention_equals_fused_attention():
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    out, weights = attend_eagerly(None, q, k, v, mask, scaling=8**-0.5)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    # float32, another order of summation
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))


# -- packed rows ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def varlen_on_cpu():
    """Registers CPU kernels for torch's variable-length attention, which has them for GPUs only."""
    varlen._varlen_attn.register_kernel("cpu", _forward)
    varlen._varlen_attn_backward.register_kernel("cpu", _backward)


def _forward(query, key, value, bounds, _, longest, __, is_causal, scale, *more):
    out = torch.empty_like(query)
    segments = _segments(query, key, value, bounds, longest, is_causal, scale)
    for segment, _q, _k, v, weights in segments:
        out[segment] = (weights @ v).transpose(0, 1)
    return out, query.new_zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad, query, key, value, out, lse, bounds, _, longest, __, is_causal, rng, scale, *more
):
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    segments = _segments(query, key, value, bounds, longest, is_causal, scale)
    for segment, q, k, v, weights in segments:
        g = grad[segment].transpose(0, 1)
        weights_grad = g @ v.mT
        row_sums = (weights_grad * weights).sum(-1, keepdim=True)
        scores_grad = weights * (weights_grad - row_sums) * scale
        segment_grads = (scores_grad @ k, scores_grad.mT @ q, weights.mT @ g)
        for whole, part in zip(grads, segment_grads, strict=True):
            whole[segment] = part.transpose(0, 1)
    return grads


def _segments(query, key, value, bounds, longest, is_causal, scale) -> Iterator[tuple]:
    """Yields each segment with its queries, keys and values (H, T, K) and its weights (H, T, T)."""
    assert is_causal
    assert bounds.dtype == torch.int32
    assert bounds.diff().max() <= longest
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        weights = (q @ k.mT * scale).masked_fill(future, -math.inf).softmax(-1)
        yield slice(start, stop), q, k, v, weights


def packed_row(lengths: list[int]) -> tuple[dict, dict]:
    """Arguments of a block for segments of these lengths: with a mask, and with bounds."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    rotary = rotary_tables(positions, head_dim=8, base=10000)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    causal = torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    mask = (segment[:, None] == segment) & causal
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    with_mask = {"rotary": rotary, "attention_mask": mask[None, None]}
    return with_mask, {"rotary": rotary, "segments": (bounds, 9)}


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_in_segments_is_attention_with_their_mask(varlen_on_cpu, compiled):
    """Output and gradients are the same; one compiled graph serves all bounds of one shape."""
    block = small_network().transformer.h[0]
    compute = block.compute
    if compiled:
        compute = torch.compile(block.compute, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    for lengths in ([9, 1, 5, 5, 0], [4, 9, 7, 0, 0], [2, 3, 4, 5, 6]):
        x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
        with_mask, with_bounds = packed_row(lengths)
        results = _outcome(compute, block, x, with_bounds)
        expected = _outcome(compute, block, x, with_mask)
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5)
    graphs = 2 if compiled else 0  # one with bounds, one with a mask
    assert counters["stats"]["unique_graphs"] == graphs


def _outcome(compute, block: LanguageBlock, x: torch.Tensor, arguments: dict) -> list[torch.Tensor]:
    """The output of a block, and the gradients of its input and its parameters."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = compute(x, **arguments)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())]


def test_only_gpus_have_a_kernel_for_segments():
    assert not has_segments_kernel(torch.zeros(1, dtype=torch.bfloat16))
