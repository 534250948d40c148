"""The language model of Qwen-VL: decoder blocks and rotary positions."""

# B batch size, T tokens, D width, H heads, K head width, S tokens in the cache including new ones

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.segments import attend_in_segments


class LanguageBlock(GradientCheckpointingLayer):
    """Pre-norm decoder block, (B, T, D) -> (B, T, D)."""

    dynamic_dims = (0, 1)  # B and T, which differ between batches

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config.hidden_size, config.intermediate_size // 2)

    def forward(self, x_BTD: torch.Tensor, **kwargs) -> torch.Tensor:
        """Runs `compute`. The keyword arguments are those of `Attention.forward`."""
        return self.compute(x_BTD, **kwargs)

    def compute(
        self, x_BTD: torch.Tensor, output_positions: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """Computes the block. This method may be compiled; `forward` has hooks of transformers.

        Args:
            output_positions: (count,), flat indices into B * T. If it is given, the MLP computes
                only these tokens, and the result is (count, D).
        """
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), **kwargs)[0]
        if output_positions is not None:
            x_BTD = x_BTD.flatten(0, 1).index_select(0, output_positions)
        return x_BTD + self.mlp(self.ln_2(x_BTD))

    def before_attention(
        self, x_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the block up to its attention, which the decoder computes itself.

        Returns:
            The queries (B, H, T, K), and the keys and values (2, B, H, T, K).
        """
        q_BHTK, k_BHTK, v_BHTK = self.attn.heads(self.ln_1(x_BTD), rotary)
        return q_BHTK, torch.stack((k_BHTK, v_BHTK))

    def after_attention(self, x_BTD: torch.Tensor, attended_BHTK: torch.Tensor) -> torch.Tensor:
        """Computes the block after its attention. `x_BTD` is the input of `before_attention`."""
        x_BTD = x_BTD + self.attn.c_proj(attended_BHTK.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class Attention(nn.Module):
    """Causal self-attention with rotary positions.

    The option `attn_implementation` of transformers chooses the kernel.
    """

    is_causal = True
    num_key_value_groups = 1  # each head has its own keys and values

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # output: q, k, v
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x_BTD, *, rotary, attention_mask=None, past_key_values=None, segments=None, **kwargs
    ):
        """Computes causal self-attention over the tokens in the cache and those of `x_BTD`.

        Args:
            rotary: the result of `rotary_tables`.
            attention_mask: the mask that transformers created for this kernel. None means causal.
            past_key_values: a cache, to which the rotated keys and the values are appended.
            segments: the arguments `bounds` and `longest` of `attend_in_segments`, for packed rows.
                Mask and cache are then not used.
            kwargs: passed to the kernel.

        Returns:
            The output (B, T, D), and the attention weights (B, H, T, S) or None if the kernel does
            not return them.
        """
        q_BHTK, k_BHTK, v_BHTK = self.heads(x_BTD, rotary)
        if segments is not None:
            attended_BTHK = attend_in_segments(
                q_BHTK, k_BHTK, v_BHTK, *segments, scaling=self.scaling
            )
            return self.c_proj(attended_BTHK.flatten(2)), None
        if past_key_values is not None:
            k_BHTK, v_BHTK = past_key_values.update(k_BHTK, v_BHTK, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, attend_eagerly
        )
        options = {"scaling": self.scaling, "dropout": 0.0}
        attended_BTHK, weights = attend(
            self, q_BHTK, k_BHTK, v_BHTK, attention_mask, **options, **kwargs
        )
        return self.c_proj(attended_BTHK.flatten(2)), weights

    def heads(
        self, x_BTD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns rotated queries, rotated keys, and values, each (B, H, T, K)."""
        qkv_BT3HK = self.c_attn(x_BTD).unflatten(-1, (3, -1, self.head_dim))
        q_BTHK, k_BTHK = rotate(qkv_BT3HK[:, :, :2], *rotary).unbind(2)
        return q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), qkv_BT3HK[:, :, 2].transpose(1, 2)


def attend_eagerly(module, q_BHTK, k_BHSK, v_BHSK, attention_mask, *, scaling, **kwargs):
    """Computes attention with basic operations, with the signature of transformers' kernels.

    Returns:
        The output (B, T, H, K) and the attention weights (B, H, T, S).
    """
    scores_BHTS = q_BHTK @ k_BHSK.mT * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = scores_BHTS.softmax(-1, dtype=torch.float32).to(q_BHTK.dtype)
    return (weights_BHTS @ v_BHSK).transpose(1, 2), weights_BHTS


class MLP(nn.Module):
    """Gated MLP, (B, T, D) -> (B, T, D). `w2` computes the gate."""

    def __init__(self, dim: int, branch: int):
        super().__init__()
        self.w1 = nn.Linear(dim, branch, bias=False)
        self.w2 = nn.Linear(dim, branch, bias=False)
        self.c_proj = nn.Linear(branch, dim, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x_BTD) * silu(self.w2(x_BTD)))


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension.

    As in the original Qwen-VL code, the norm is computed in float32, and the result is cast back
    before it is multiplied by the weight.
    """

    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], eps=self.epsilon) * self.weight


def rotary_tables(
    positions: torch.Tensor,
    head_dim: int,
    base: float,
    *,
    alpha: int = 1,
    logn_above: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and sines of `positions` (B, T) for `rotate`, float32 (B, T, 1, 1, K / 2).

    Args:
        alpha: see `rotary_frequencies`.
        logn_above: if it is given, log-n attention is used. The tables are then
            (B, T, 2, 1, K / 2), and those of the queries are scaled by
            max(1, ln(position + 1) / ln(logn_above)). Rotation and scaling commute, so no layer
            needs to scale its queries.
    """
    frequencies = rotary_frequencies(head_dim, base, alpha, device=positions.device)
    return rotary_tables_at(positions, frequencies, logn_above=logn_above)


def rotary_frequencies(
    head_dim: int, base: float, alpha: int = 1, device: torch.device | None = None
) -> torch.Tensor:
    """Returns the rotation of each pair of channels in radians per position, float32 (K / 2,).

    Args:
        alpha: the factor by which the wavelength of the slowest pair is stretched, see `ntk_alpha`.
            Faster pairs are stretched less, and the fastest one is not stretched.
    """
    base = base * alpha ** (head_dim / (head_dim - 2))
    return 1 / base ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def rotary_tables_at(
    positions: torch.Tensor, frequencies: torch.Tensor, *, logn_above: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `rotary_tables` for frequencies (K / 2,) or, by row, (B, 1, 1, 1, K / 2)."""
    angles = positions[:, :, None, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if logn_above is None:
        return cos, sin
    scale_BT = ((positions.float() + 1).log() / math.log(logn_above)).clamp(min=1)
    scale_BT2 = torch.stack((scale_BT, torch.ones_like(scale_BT)), dim=-1)  # queries, keys
    scale = scale_BT2[..., None, None]
    return cos * scale, sin * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates channels i and i + K / 2 of x (B, T, 2, H, K) by the angles of `rotary_tables`.

    Computes in float32. The result has the dtype of `x`.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
