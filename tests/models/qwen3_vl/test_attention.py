from itertools import pairwise

import pytest
import torch
from small_qwen3_vl import CLOSE, KINDS, PROMPTS, packed, small_network
from torch import nn
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from qwenvl_lit.models.qwen3_vl import attention
from qwenvl_lit.models.qwen3_vl.attention import attend, segment_mask

BOUNDS = torch.tensor([0, 4, 4, 5, 12, 12], dtype=torch.int32)  # two segments are empty


class Module(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def heads() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, 12, 8, generator=generator) for count in (4, 2, 2)]


@pytest.mark.parametrize("causal", [True, False])
def test_segments_are_attended_as_with_their_mask(causal):
    mask = torch.zeros(12, 12, dtype=torch.bool)
    for start, stop in pairwise(BOUNDS.tolist()):
        mask[start:stop, start:stop] = True
    if causal:
        mask = mask.tril()
    assert torch.equal(segment_mask(BOUNDS, 12, causal=causal), mask)
    expected = scaled_dot_product_attention(*heads(), attn_mask=mask, scale=0.5, enable_gqa=True)
    options = {"scaling": 0.5, "is_causal": causal, "cu_seq_lens_q": BOUNDS, "max_length_q": 7}
    attended, _ = attend(Module(), *heads(), None, **options)
    torch.testing.assert_close(attended, expected.transpose(1, 2))


def test_without_segments_attention_is_causal_or_has_the_mask_of_generate():
    expected = scaled_dot_product_attention(*heads(), is_causal=True, enable_gqa=True)
    attended, _ = attend(Module(), *heads(), None, scaling=8**-0.5)
    torch.testing.assert_close(attended, expected.transpose(1, 2))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    attended, _ = attend(Module(), *heads(), mask, scaling=8**-0.5)
    torch.testing.assert_close(attended, expected.transpose(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_of_gpus_gets_bounds_that_mean_the_same(kind, monkeypatch):
    network = small_network(kind)
    inputs = packed(PROMPTS, network.config)
    expected = network(**inputs).logits
    calls = []

    def varlen_attn(q, k, v, bounds, _, longest, __, *, scale, window_size, enable_gqa=False):
        assert bounds.dtype == torch.int32
        assert isinstance(longest, int)
        assert bounds.diff().max() <= longest
        assert enable_gqa == (q.shape[1] != k.shape[1])
        calls.append(window_size)
        mask = segment_mask(bounds, len(q), causal=window_size == (-1, 0))
        qkv = [x.transpose(0, 1)[None] for x in (q, k, v)]
        attended = scaled_dot_product_attention(
            *qkv, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        return attended[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "has_segments_kernel", lambda x: True)
    torch.testing.assert_close(network(**inputs).logits, expected, **CLOSE)
    assert calls == [(-1, -1)] * 3 + [(-1, 0)] * 3  # blocks of the tower, of the language model
    # Older versions of torch
    monkeypatch.setattr(
        varlen,
        "varlen_attn",
        lambda *args, scale, window_size: varlen_attn(*args, scale=scale, window_size=window_size),
    )
    torch.testing.assert_close(network(**inputs).logits, expected, **CLOSE)
