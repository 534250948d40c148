"""Stands in for the published file of this name: the same modules and the same values.

It is written from what `tests/parity` compares. The resampler's attention is torch's, as there,
which reads the weight of `out_proj` without calling the layer.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


def resized(table, patches):
    grid, side = math.isqrt(len(table)), math.isqrt(patches)
    if grid == side:
        return table
    grid_table = table.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    grid_table = interpolate(grid_table, size=(side, side), mode="bicubic", align_corners=False)
    return grid_table.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.in_proj(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, int(width * mlp_ratio)))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(int(width * mlp_ratio), width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Resampler(nn.Module):
    def __init__(self, dim, patch_dim, n_queries):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(n_queries, dim), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(n_queries, dim))
        self.kv_proj = nn.Linear(patch_dim, dim, bias=False)
        self.attn = nn.MultiheadAttention(dim, dim // 128)
        self.ln_q = nn.LayerNorm(dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = self.ln_kv(self.kv_proj(x)).transpose(0, 1)
        query = self.ln_q(self.query) + self.pos_embed
        query = query[:, None].expand(-1, x.shape[1], -1)
        positions = resized(self.pos_embed, len(x))[:, None]
        return self.attn(query, x + positions, x)[0].transpose(0, 1)


class VisionTransformer(nn.Module):
    def __init__(
        self,
        image_size,
        patch_size,
        width,
        layers,
        heads,
        mlp_ratio,
        n_queries=256,
        output_dim=512,
        **kwargs,
    ):
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(256, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        blocks = [VisionBlock(width, heads, mlp_ratio) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.attn_pool = Resampler(output_dim, width, n_queries)
        self.ln_post = nn.LayerNorm(output_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(output_dim, output_dim))

    def encode(self, paths):
        images = []
        for path in paths:
            image = Image.open(path).convert("RGB").resize((self.image_size, self.image_size), 3)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            images.append((pixels / 255 - MEAN) / STD)
        x = self.conv1(torch.stack(images)).flatten(2).mT
        x = self.ln_pre(x + resized(self.positional_embedding, x.shape[1]))
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj
