"""The vision tower of Qwen-VL.

A vision transformer encodes the patches of an image. A resampler converts the encoded patches to a
fixed number of tokens.
"""

# N images, S image side in pixels, P patches, Q queries (tokens of an image),
# C width of the tower, D width of the language model, H heads, K head width

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer

EPSILON = 1e-6
POSITIONS = 256  # positions of the tower's embedding table, 16 x 16 in all published checkpoints

RunBlock: TypeAlias = "Callable[[VisionBlock, torch.Tensor], torch.Tensor]"


class VisionTower(nn.Module):
    """Images (N, 3, S, S) -> image tokens (N, Q, D). S may be any multiple of the patch size.

    Args:
        spatial_start: the scale of a spatial initialization, for small networks that are trained
            from scratch. None in the published models. With a scale, position embeddings start as
            sines and cosines, and the query and key projections of the resampler both start as the
            same orthogonal matrix times the scale. Each query then attends to its own location at
            the start of training.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        output_dim: int,
        n_queries: int,
        resampler_heads: int,
        spatial_start: float | None,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.spatial_start = spatial_start
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, width))
        self.ln_pre = nn.LayerNorm(width, eps=EPSILON)
        blocks = nn.ModuleList(VisionBlock(width, heads, mlp_ratio) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.attn_pool = Resampler(output_dim, width, n_queries, resampler_heads, spatial_start)
        self.ln_post = nn.LayerNorm(output_dim, eps=EPSILON)
        self.proj = nn.Parameter(torch.empty(output_dim, output_dim))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes normalized pixels (N, 3, S, S) as (N, Q, D).

        Raises:
            ValueError: the pixels have another shape, or S is not a multiple of the patch size.
        """
        return self.encode(pixel_values)

    def encode(self, pixel_values: torch.Tensor, run_block: RunBlock | None = None) -> torch.Tensor:
        """Encodes images as `forward` does.

        Args:
            run_block: called for each block with the block and its input, and returns its output.
                By default, the block is called. The decoder passes a compiled function.
        """
        x_NPC = self.encode_patches(pixel_values, run_block)
        return self.ln_post(self.attn_pool(x_NPC)) @ self.proj

    def encode_patches(
        self, pixel_values: torch.Tensor, run_block: RunBlock | None = None
    ) -> torch.Tensor:
        """Returns the patches (N, P, C) that the resampler attends to; see `encode`."""
        shape = pixel_values.shape
        if len(shape) != 4 or shape[2] != shape[3] or shape[3] % self.patch_size:
            expected = f"(N, 3, S, S) with S a multiple of {self.patch_size}"
            raise ValueError(f"pixel_values has shape {tuple(shape)}, expected {expected}")
        x_NPC = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).mT
        x_NPC = self.ln_pre(x_NPC + resize_positions(self.positional_embedding, x_NPC.shape[1]))
        for block in self.transformer["resblocks"]:
            x_NPC = block(x_NPC) if run_block is None else run_block(block, x_NPC)
        return x_NPC


class VisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block, (N, P, C) -> (N, P, C)."""

    dynamic_dims = (0,)  # N, which differs between batches

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)  # truncated: 1664 * 4.9231 is 8192.04
        self.ln_1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = VisionAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=EPSILON)
        layers = OrderedDict(
            c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width)
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        return self.compute(x_NPC)

    def compute(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """Computes the block. This method may be compiled, see `LanguageBlock.compute`."""
        x_NPC = x_NPC + self.attn(self.ln_1(x_NPC))
        return x_NPC + self.mlp(self.ln_2(x_NPC))


class VisionAttention(nn.Module):
    """Self-attention over all patches, (N, P, C) -> (N, P, C).

    The output channels of `in_proj` are q, k and v of head 0, then q, k and v of head 1, and so on.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        qkv_NPH3K = self.in_proj(x_NPC).unflatten(-1, (self.heads, 3, -1))
        q_NHPK, k_NHPK, v_NHPK = qkv_NPH3K.permute(3, 0, 2, 1, 4)
        attended_NHPK = scaled_dot_product_attention(q_NHPK, k_NHPK, v_NHPK)
        return self.out_proj(attended_NHPK.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Cross-attention of trained queries to the patches of an image, (N, P, C) -> (N, Q, D).

    Position embeddings are added to queries and keys, not to values. Their table is a buffer,
    because it is saved with the weights but never trained.
    """

    def __init__(
        self, dim: int, patch_dim: int, n_queries: int, heads: int, spatial_start: float | None
    ):
        super().__init__()
        self.query = nn.Parameter(torch.empty(n_queries, dim))
        self.register_buffer("pos_embed", torch.empty(n_queries, dim))
        self.kv_proj = nn.Identity()  # has no weight, as in the published checkpoints
        if patch_dim != dim:
            self.kv_proj = nn.Linear(patch_dim, dim, bias=False)
        self.spatial_start = spatial_start
        self.attn = CrossAttention(dim, heads)
        self.ln_q = nn.LayerNorm(dim, eps=EPSILON)
        self.ln_kv = nn.LayerNorm(dim, eps=EPSILON)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        return self.attn(*self.attention_inputs(x_NPC))

    def attention_inputs(
        self, x_NPC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries (Q, D), keys (N, P, D) and values (N, P, D), before their projections."""
        x_NPD = self.ln_kv(self.kv_proj(x_NPC))
        query_QD = self.ln_q(self.query)
        query_QD = query_QD + self.pos_embed.to(query_QD.dtype)
        positions_PD = resize_positions(self.pos_embed, x_NPD.shape[1]).to(x_NPD.dtype)
        return query_QD, x_NPD + positions_PD, x_NPD


class CrossAttention(nn.Module):
    """Attention of Q queries to P patches.

    In checkpoint files, the three input projections are a single weight, `in_proj_weight`, and a
    single bias. In this class, each projection is a linear layer, so that adapters can wrap it and
    no input is projected more often than necessary. `models.qwen_vl.network` registers a conversion
    with which transformers splits the projections on loading and joins them on saving.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, query_QD: torch.Tensor, key_NPD: torch.Tensor, value_NPD: torch.Tensor
    ) -> torch.Tensor:
        """Returns the attention output (N, Q, D). All images share the queries."""
        q_HQK, k_NHPK = self._queries_and_keys(query_QD, key_NPD)
        v_NHPK = self.v_proj(value_NPD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_NHQK = q_HQK.expand(len(k_NHPK), -1, -1, -1)
        attended_NHQK = scaled_dot_product_attention(q_NHQK, k_NHPK, v_NHPK)
        return self.out_proj(attended_NHQK.transpose(1, 2).flatten(2))

    def weights(self, query_QD: torch.Tensor, key_NPD: torch.Tensor) -> torch.Tensor:
        """Returns the attention weights (N, H, Q, P) of `forward`, float32."""
        q_HQK, k_NHPK = self._queries_and_keys(query_QD, key_NPD)
        scores_NHQP = q_HQK.float() @ k_NHPK.float().mT * q_HQK.shape[-1] ** -0.5
        return scores_NHQP.softmax(-1)

    def _queries_and_keys(
        self, query_QD: torch.Tensor, key_NPD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_HQK = self.q_proj(query_QD).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        k_NHPK = self.k_proj(key_NPD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return q_HQK, k_NHPK


def resize_positions(table: torch.Tensor, patches: int) -> torch.Tensor:
    """Interpolates a square grid of position embeddings (G * G, C) bicubically to (P, C).

    If G * G = P, the table is returned unchanged.
    """
    if len(table) == patches:
        return table
    with no_autocast(table.device):
        return (_interpolation(len(table), patches, table.device) @ table.float()).to(table.dtype)


@lru_cache
def _interpolation(positions: int, patches: int, device: torch.device) -> torch.Tensor:
    """Returns bicubic interpolation as a matrix (P, G * G): weights of positions for each patch.

    Multiplying by this matrix is faster than torch's interpolation kernel, which takes 14 ms for a
    table on an H100.
    """
    grid, side = math.isqrt(positions), math.isqrt(patches)
    with torch.inference_mode(False):  # the matrix may be saved for a backward pass later
        one_hot = torch.eye(positions).unflatten(0, (grid, grid))
        one_hot = one_hot.permute(2, 0, 1)[None]  # (1, G * G, G, G)
        weights = interpolate(one_hot, size=(side, side), mode="bicubic", align_corners=False)
        return weights[0].flatten(1).t().contiguous().to(device)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Returns a context manager that disables autocast on `device`."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def sine_cosine_positions(positions: int, dim: int) -> torch.Tensor:
    """Returns the fixed embeddings (positions, dim) of a square grid in reading order.

    The first half of the channels are sines and cosines of x. The second half are sines and cosines
    of y.

    >>> sine_cosine_positions(4, 4)[1]  # at x = 1, y = 0
    tensor([0.8415, 0.5403, 0.0000, 1.0000])
    """
    side = math.isqrt(positions)
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, dim / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, dim / 2)
    return torch.cat((axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)), dim=1).float()
