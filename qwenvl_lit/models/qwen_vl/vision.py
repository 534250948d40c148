"""The image side of Qwen-VL: a vision transformer, and a resampler that makes the tokens of an image from its patches."""

# N images, S side in pixels, P patches, Q queries (tokens of an image), C tower's width, D language model's width, H heads, K head width

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer

EPSILON = 1e-6
POSITIONS = 256  # entries of the tower's position table, 16 x 16 in every published file


class VisionTower(nn.Module):
    """Images (N, 3, S, S) to the tokens that stand for them (N, Q, D). S may be any multiple of the patch size.

    Args:
        spatial_start: a start for small networks that learn to see from nothing; the published ones have None. The tower's positions begin
            as sines and cosines, and the resampler's projections of queries and keys as the same matrix, so many times as large as a
            rotation: a query leans towards its own place in the image.
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
        self.transformer = nn.ModuleDict(
            {
                "resblocks": nn.ModuleList(
                    VisionBlock(width, heads, mlp_ratio) for _ in range(layers)
                )
            }
        )
        self.attn_pool = Resampler(output_dim, width, n_queries, resampler_heads, spatial_start)
        self.ln_post = nn.LayerNorm(output_dim, eps=EPSILON)
        self.proj = nn.Parameter(torch.empty(output_dim, output_dim))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (N, 3, S, S) -> (N, Q, D).

        Raises:
            ValueError: another shape, or a side that is no multiple of the patch size.
        """
        if (
            pixel_values.dim() != 4
            or pixel_values.shape[2] != pixel_values.shape[3]
            or pixel_values.shape[3] % self.patch_size
        ):
            expected = f"(N, 3, S, S) with S a multiple of {self.patch_size}"
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected {expected}"
            )
        x_NPC = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).mT
        x_NPC = self.ln_pre(x_NPC + resize_positions(self.positional_embedding, x_NPC.shape[1]))
        for block in self.transformer["resblocks"]:
            x_NPC = block(x_NPC)
        return self.ln_post(self.attn_pool(x_NPC)) @ self.proj


class VisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block, (N, P, C) -> (N, P, C)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)  # truncated: 1664 * 4.9231 is 8192.04
        self.ln_1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = VisionAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width)
            ),
        )

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        return self.compute(x_NPC)

    def compute(self, x_NPC: torch.Tensor) -> torch.Tensor:
        """As `LanguageBlock.compute`."""
        x_NPC = x_NPC + self.attn(self.ln_1(x_NPC))
        return x_NPC + self.mlp(self.ln_2(x_NPC))


class VisionAttention(nn.Module):
    """Every patch attends to every patch, (N, P, C) -> (N, P, C). `in_proj` is interleaved: q, k, v of head 0, then of head 1, ..."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        q_NHPK, k_NHPK, v_NHPK = (
            self.in_proj(x_NPC).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        )
        attended_NHPK = scaled_dot_product_attention(q_NHPK, k_NHPK, v_NHPK)
        return self.out_proj(attended_NHPK.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Learned queries gather the patches, (N, P, C) -> (N, Q, D).

    Positions join queries and keys, not values. Their table is stored with the weights but never trained, hence a buffer.
    """

    def __init__(
        self, dim: int, patch_dim: int, n_queries: int, heads: int, spatial_start: float | None
    ):
        super().__init__()
        self.query = nn.Parameter(torch.empty(n_queries, dim))
        self.register_buffer("pos_embed", torch.empty(n_queries, dim))
        self.kv_proj = (
            nn.Linear(patch_dim, dim, bias=False) if patch_dim != dim else nn.Identity()
        )  # no weight, as the original
        self.spatial_start = spatial_start
        self.attn = CrossAttention(dim, heads)
        self.ln_q = nn.LayerNorm(dim, eps=EPSILON)
        self.ln_kv = nn.LayerNorm(dim, eps=EPSILON)

    def forward(self, x_NPC: torch.Tensor) -> torch.Tensor:
        x_NPD = self.ln_kv(self.kv_proj(x_NPC))
        query_QD = self.ln_q(self.query)
        query_QD = query_QD + self.pos_embed.to(query_QD.dtype)
        positions_PD = resize_positions(self.pos_embed, x_NPD.shape[1]).to(x_NPD.dtype)
        return self.attn(query_QD, x_NPD + positions_PD, x_NPD)


class CrossAttention(nn.Module):
    """Q queries attend to P patches.

    In files the three input projections are one tensor, `in_proj_weight`, and one bias; here each is a linear layer of its own, so that
    adapters reach it and nothing is computed in vain. `models.qwen_vl` tells transformers to split and to join them.
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
        """The queries are the same for all images; returns (N, Q, D)."""
        q_HQK = self.q_proj(query_QD).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        k_NHPK = self.k_proj(key_NPD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v_NHPK = self.v_proj(value_NPD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended_NHQK = scaled_dot_product_attention(
            q_HQK.expand(len(k_NHPK), -1, -1, -1), k_NHPK, v_NHPK
        )
        return self.out_proj(attended_NHQK.transpose(1, 2).flatten(2))


def resize_positions(table: torch.Tensor, patches: int) -> torch.Tensor:
    """A square grid of positions, one per row (G * G, C), interpolated bicubically to the square grid of patches (P, C)."""
    if len(table) == patches:
        return table
    with computed_as_stored(table.device):
        return (_interpolation(len(table), patches, table.device) @ table.float()).to(table.dtype)


@lru_cache
def _interpolation(positions: int, patches: int, device: torch.device) -> torch.Tensor:
    """What each of the patches takes from each of the positions, (P, G * G): torch's own kernel takes 14 ms for a table on an H100, more
    than a product."""
    grid, side = math.isqrt(positions), math.isqrt(patches)
    with torch.inference_mode(False):  # it may be kept for a gradient later
        each = (
            torch.eye(positions).unflatten(0, (grid, grid)).permute(2, 0, 1)[None]
        )  # (1, G * G, G, G)
        share = interpolate(each, size=(side, side), mode="bicubic", align_corners=False)
        return share[0].flatten(1).t().contiguous().to(device)


def computed_as_stored(device: torch.device) -> AbstractContextManager:
    """No autocast inside."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type)
        else nullcontext()
    )


def sine_cosine_positions(positions: int, dim: int) -> torch.Tensor:
    """Fixed embedding (positions, dim) of a square grid in reading order: sines and cosines of x, then those of y.

    >>> sine_cosine_positions(4, 4)[1]  # at x = 1, y = 0
    tensor([0.8415, 0.5403, 0.0000, 1.0000])
    """
    side = math.isqrt(positions)
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, dim / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, dim / 2)
    return torch.cat((axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)), dim=1).float()
