"""Attention of Qwen2.5-VL and Qwen3-VL: packed samples and images without masks.

transformers' own attention builds a mask for packed rows, and asks the device for the lengths of
images and windows.
"""

# B batch size, T tokens, H heads, G heads of keys and values, K head width, P patches, C width of
# the tower

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from qwenvl_lit.models.segments import attend_in_segments, has_segments_kernel

ATTENTION = "segments"  # the name of `attend` as `attn_implementation`


def attend(
    module: nn.Module,
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Computes attention, with the signature of transformers' kernels.

    Args:
        module: the attention module. Its `is_causal` applies unless `is_causal` is given.
        attention_mask: for generation. Without a mask, attention is causal or full.
        cu_seq_lens_q: the bounds of segments, for one packed row; see `attend_in_segments`.
        max_length_q: an upper bound of the length of a segment.
        kwargs: not used.

    Returns:
        The output (B, T, H, K), and None in place of attention weights.
    """
    causal = module.is_causal if is_causal is None else is_causal
    # On the meta device, only shapes matter.
    if cu_seq_lens_q is None or q_BHTK.is_meta:
        return sdpa_attention_forward(
            module,
            q_BHTK,
            k_BGTK,
            v_BGTK,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=causal,
        )
    qkv = q_BHTK, k_BGTK, v_BGTK
    if has_segments_kernel(q_BHTK):
        assert max_length_q is not None
        device_type = q_BHTK.device.type
        if torch.is_autocast_enabled(device_type):  # float32 rotary tables make float32 queries
            qkv = [x.to(torch.get_autocast_dtype(device_type)) for x in qkv]
        attended_BTHK = attend_in_segments(
            *qkv, cu_seq_lens_q, max_length_q, scaling=scaling, causal=causal
        )
    elif q_BHTK.device.type == "cpu":
        attended_BTHK = _attend_one_by_one(*qkv, cu_seq_lens_q, scaling=scaling, causal=causal)
    else:
        mask_TT = segment_mask(cu_seq_lens_q, q_BHTK.shape[2], causal=causal)
        attended_BHTK = scaled_dot_product_attention(
            *qkv, attn_mask=mask_TT, scale=scaling, enable_gqa=_is_grouped(q_BHTK, k_BGTK)
        )
        attended_BTHK = attended_BHTK.transpose(1, 2)
    return attended_BTHK, None


def segment_mask(bounds: torch.Tensor, length: int, *, causal: bool) -> torch.Tensor:
    """Returns which tokens of a row attend to which, (length, length), without synchronizing."""
    tokens = torch.arange(length, device=bounds.device, dtype=bounds.dtype)
    segments = torch.bucketize(tokens, bounds[1:], right=True)
    mask_TT = segments[:, None] == segments
    return mask_TT.tril() if causal else mask_TT


def _attend_one_by_one(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    bounds: torch.Tensor,
    *,
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    """Computes what `attend_in_segments` does on a CPU, one segment after the other."""
    grouped = _is_grouped(q_BHTK, k_BGTK)
    attended = []
    for start, stop in pairwise(bounds.tolist()):
        if start == stop:
            continue
        qkv = [x[:, :, start:stop] for x in (q_BHTK, k_BGTK, v_BGTK)]
        attended.append(
            scaled_dot_product_attention(*qkv, scale=scaling, is_causal=causal, enable_gqa=grouped)
        )
    return torch.cat(attended, dim=2).transpose(1, 2)


def _is_grouped(q_BHTK: torch.Tensor, k_BGTK: torch.Tensor) -> bool:
    return q_BHTK.shape[1] != k_BGTK.shape[1]


class VisionAttention(nn.Module):
    """Attention of a block of the vision tower, within images or windows.

    Args:
        original: the module of transformers whose layers are taken over.
    """

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, original: nn.Module):
        super().__init__()
        self.num_heads = original.num_heads
        self.scaling = original.scaling
        self.qkv = original.qkv
        self.proj = original.proj

    def forward(
        self,
        x_PC: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        max_seqlen: int,
        **kwargs,
    ) -> torch.Tensor:
        """Computes attention within the segments with the bounds `cu_seqlens`, (P, C)."""
        q_PHK, k_PHK, v_PHK = self.qkv(x_PC).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_PHK, k_PHK = apply_rotary_pos_emb_vision(q_PHK, k_PHK, *position_embeddings)
        qkv_1HPK = [x_PHK.transpose(0, 1)[None] for x_PHK in (q_PHK, k_PHK, v_PHK)]
        attended_1PHK, _ = attend(
            self,
            *qkv_1HPK,
            None,
            scaling=self.scaling,
            cu_seq_lens_q=cu_seqlens,
            max_length_q=max_seqlen,
        )
        return self.proj(attended_1PHK[0].flatten(1))


class PatchEmbedding(nn.Module):
    """Embeds patches (P, pixels of a patch) as (P, C).

    transformers computes a convolution of one output each, for which there are only slow kernels in
    bfloat16.

    Args:
        original: the module of transformers whose convolution is taken over.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.proj = original.proj

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        proj, patches = self.proj, patches.to(self.proj.weight.dtype)
        if proj.weight.is_meta:  # offloaded: accelerate loads it when the layer is called
            return proj(patches.unflatten(1, (proj.in_channels, *proj.kernel_size))).flatten(1)
        return linear(patches, proj.weight.flatten(1), proj.bias)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
# There is no mask without padding. `generate` needs one for left-padded rows.
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
