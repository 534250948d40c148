import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from qwenvl_lit.models.language import MLP, RMSNorm, attend_eagerly, ntk_alpha, rotary_tables, rotate


@pytest.mark.parametrize(("length", "alpha"), [(1, 1), (2047, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15)])
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
    qk = rotate(torch.stack((q, k)).view(1, 1, 2, 1, 16).expand(1, 100, 2, 1, 16), *tables)[0, :, :, 0]
    scores = qk[:, 0] @ qk[:, 1].T
    torch.testing.assert_close(scores.diagonal(7), scores[0, 7].expand(93), atol=1e-5, rtol=0)  # float32 angles up to 100


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
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=2**-7)  # one step of bfloat16: 1 / sqrt against rsqrt


def test_the_second_branch_of_the_mlp_is_the_gate():
    mlp, x = MLP(8, 16), torch.randn(2, 8)
    torch.testing.assert_close(mlp(x), mlp.c_proj(mlp.w1(x) * silu(mlp.w2(x))))


def test_eager_attention_is_the_fused_one():
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    out, weights = attend_eagerly(None, q, k, v, mask, scaling=8**-0.5)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)  # float32, another order of summation
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
