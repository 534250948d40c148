"""The language side of Qwen-VL: decoder blocks, rotary positions, and the two rules for texts longer than those of training."""

# B rows, T tokens, D width, H heads, K head width, F width of one MLP branch

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig


class LanguageBlock(GradientCheckpointingLayer):
    """Pre-norm decoder block, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config.hidden_size, config.intermediate_size // 2)

    def forward(self, x_BTD: torch.Tensor, **kwargs) -> torch.Tensor:
        """The keyword arguments are those of `Attention`."""
        return self.compute(x_BTD, **kwargs)

    def compute(
        self, x_BTD: torch.Tensor, kept: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """What may be compiled: transformers wraps `forward` in other things that are done around a block.

        With `kept` (S,), flat indices into B * T, these tokens alone come out, (S, D).
        """
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), **kwargs)[0]
        if kept is not None:
            x_BTD = x_BTD.flatten(0, 1).index_select(0, kept)
        return x_BTD + self.mlp(self.ln_2(x_BTD))

    def before(
        self, x_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block up to its attention, for a decoder with a cache of its own: queries (B, H, T, K), keys with values (2, B, H, T, K)."""
        q_BHTK, k_BHTK, v_BHTK = self.attn.heads(self.ln_1(x_BTD), rotary)
        return q_BHTK, torch.stack((k_BHTK, v_BHTK))

    def after(self, x_BTD: torch.Tensor, attended_BHTK: torch.Tensor) -> torch.Tensor:
        """The block from its attention on, for the same `x_BTD` that `before` had."""
        x_BTD = x_BTD + self.attn.c_proj(attended_BHTK.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class Attention(nn.Module):
    """Causal self-attention with rotary positions; the kernel is transformers' `attn_implementation`."""

    is_causal = True
    num_key_value_groups = 1  # every head has its own keys and values

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # rows: q | k | v
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x_BTD, *, rotary, attention_mask=None, past_key_values=None, segments=None, **kwargs
    ):
        """Tokens attend to themselves, to those before them, and to what is in the cache.

        Args:
            rotary: what `rotary_tables` returns.
            attention_mask: what transformers made for the kernel in use; `None` is plain causal.
            past_key_values: a cache, to which the rotated keys and the values are added.
            segments: bounds and longest of the segments of packed rows, as `attend_in_segments` takes them; in place of a mask and a cache.
            kwargs: handed on to the kernel.

        Returns:
            (B, T, D), and the weights (B, H, T, slots) where the kernel has them, else `None`.
        """
        q_BHTK, k_BHTK, v_BHTK = self.heads(x_BTD, rotary)
        if segments is not None:
            return self.c_proj(
                attend_in_segments(q_BHTK, k_BHTK, v_BHTK, *segments, scaling=self.scaling).flatten(
                    2
                )
            ), None
        if past_key_values is not None:
            k_BHTK, v_BHTK = past_key_values.update(k_BHTK, v_BHTK, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, attend_eagerly
        )
        attended_BTHK, weights = attend(
            self,
            q_BHTK,
            k_BHTK,
            v_BHTK,
            attention_mask,
            scaling=self.scaling,
            dropout=0.0,
            **kwargs,
        )
        return self.c_proj(attended_BTHK.flatten(2)), weights

    def heads(
        self, x_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, turned, and values, each (B, H, T, K)."""
        qkv_BT3HK = self.c_attn(x_BTD).unflatten(-1, (3, -1, self.head_dim))
        q_BTHK, k_BTHK = rotate(qkv_BT3HK[:, :, :2], *rotary).unbind(2)
        return q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), qkv_BT3HK[:, :, 2].transpose(1, 2)


def attend_eagerly(module, q_BHTK, k_BHSK, v_BHSK, attention_mask, *, scaling, **kwargs):
    """Attention in plain operations over S slots, with the signature of transformers' kernels: (B, T, H, K) and weights (B, H, T, S)."""
    scores_BHTS = q_BHTK @ k_BHSK.mT * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = scores_BHTS.softmax(-1, dtype=torch.float32).to(q_BHTK.dtype)
    return (weights_BHTS @ v_BHSK).transpose(1, 2), weights_BHTS


def attend_in_segments(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTK: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    scaling: float,
) -> torch.Tensor:
    """Causal attention within each segment of packed rows, (B, T, H, K), where `has_segments_kernel`. It costs what the segments cost, and
    neither makes a mask nor waits for the device.

    Args:
        bounds: (n + 1,) int32, cumulative lengths of the segments over all B * T tokens; segments may be empty.
        longest: no segment has more tokens.
    """
    from torch.nn.attention.varlen import (
        varlen_attn,  # brings the compiler with it, which takes seconds
    )

    rows_BTHK = [x_BHTK.transpose(1, 2) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK)]
    flat = [x_BTHK.flatten(0, 1) for x_BTHK in rows_BTHK]
    causal = (-1, 0)  # all tokens before, none after
    return varlen_attn(
        *flat, bounds, bounds, longest, longest, scale=scaling, window_size=causal
    ).view(rows_BTHK[0].shape)


def has_segments_kernel(x: torch.Tensor) -> bool:
    """Whether `attend_in_segments` runs on the device of `x`, in the precision in which its products are computed."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return (
        x.is_cuda
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


class MLP(nn.Module):
    """Gated MLP, (B, T, D) -> (B, T, D): `w2` is the gate."""

    def __init__(self, dim: int, branch: int):
        super().__init__()
        self.w1 = nn.Linear(dim, branch, bias=False)
        self.w2 = nn.Linear(dim, branch, bias=False)
        self.c_proj = nn.Linear(branch, dim, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x_BTD) * silu(self.w2(x_BTD)))


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension; torch computes it in float32 and casts it back, before the weight as the original."""

    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], eps=self.epsilon) * self.weight


def rotary_tables(
    slots: torch.Tensor,
    head_dim: int,
    base: float,
    *,
    alpha: int = 1,
    logn_above: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `rotate`, float32 (B, T, 1, 1, K / 2), at the positions `slots` (B, T).

    Args:
        alpha: see `rotary_frequencies`.
        logn_above: if given, the tables are (B, T, 2, 1, K / 2) and those of the queries are scaled by ln(slot + 1) / ln(logn_above)
            where that is above 1 (log-n attention). Turning and scaling commute, so it costs nothing per layer.
    """
    return rotary_tables_at(
        slots, rotary_frequencies(head_dim, base, alpha, device=slots.device), logn_above=logn_above
    )


def rotary_frequencies(
    head_dim: int, base: float, alpha: int = 1, device: torch.device | None = None
) -> torch.Tensor:
    """Radians per slot, float32 (K / 2,). `alpha` stretches the slow channels by about this much, the fastest not at all: `ntk_alpha`."""
    base = base * alpha ** (head_dim / (head_dim - 2))
    return 1 / base ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def rotary_tables_at(
    slots: torch.Tensor, frequencies: torch.Tensor, *, logn_above: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rotary_tables`, with given frequencies: (K / 2,), or (B, 1, 1, 1, K / 2) where each row has its own."""
    angles = slots[:, :, None, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if logn_above is None:
        return cos, sin
    scale = ((slots.float() + 1).log() / math.log(logn_above)).clamp(min=1)
    scale = torch.stack((scale, torch.ones_like(scale)), dim=-1)[
        ..., None, None
    ]  # (B, T, 2, 1, 1): queries, keys
    return cos * scale, sin * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns channel i together with channel i + K / 2 of x (B, T, 2, H, K) by the angles of `rotary_tables`, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def ntk_alpha(length: int, seq_length: int) -> int:
    """Dynamic NTK: how far the rotary base of a text of `length` tokens is stretched beyond the `seq_length` of training.

    >>> [ntk_alpha(length, 2048) for length in (1, 2048, 2049, 4096, 4097)]
    [1, 1, 3, 3, 7]
    """
    return max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)
