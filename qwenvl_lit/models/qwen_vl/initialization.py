"""Initializes the weights of a Qwen-VL network that transformers would initialize differently."""

from __future__ import annotations

import math

from torch import nn
from transformers import initialization as init

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.language import MLP, Attention
from qwenvl_lit.models.qwen_vl.vision import (
    CrossAttention,
    Resampler,
    VisionBlock,
    VisionTower,
    sine_cosine_positions,
)


def initialize(module: nn.Module, config: QwenVLConfig) -> None:
    """Initializes the weights of `module` as the original Qwen-VL code does.

    This function is called after transformers' `_init_weights`, which initializes linear layers and
    embeddings from a normal distribution with `initializer_range`, norms with ones, and biases with
    zeros. transformers initializes child modules before their parents. The functions of
    `transformers.initialization` do not change tensors that were loaded from a file.
    """
    if isinstance(module, (Attention, MLP)):
        _initialize_residual(module.c_proj, config)
    elif isinstance(module, VisionBlock):
        _initialize_residual(module.mlp.c_proj, config)
    elif isinstance(module, nn.Conv2d):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    elif isinstance(module, VisionTower):
        positions, width = module.positional_embedding.shape
        if module.spatial_start:
            init.copy_(module.positional_embedding, sine_cosine_positions(positions, width))
        else:
            init.normal_(module.positional_embedding, std=width**-0.5)
        init.normal_(module.proj, std=len(module.proj) ** -0.5)
    elif isinstance(module, Resampler):
        init.trunc_normal_(module.query, std=0.02)
        init.copy_(module.pos_embed, sine_cosine_positions(*module.pos_embed.shape))
        if module.spatial_start:
            _initialize_spatial(module.attn, module.spatial_start)
    elif isinstance(module, CrossAttention):
        # The original Qwen-VL code initializes the three projections as one (3 * D, D) matrix.
        gain = math.sqrt(0.5)
        for layer in (module.v_proj, module.q_proj, module.k_proj):
            init.xavier_uniform_(layer.weight, gain)


def _initialize_residual(layer: nn.Linear, config: QwenVLConfig) -> None:
    """Initializes a layer that adds to the residual stream with smaller weights, as GPT-2 does.

    The original Qwen-VL code uses the number of language blocks in the vision tower as well.
    """
    std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    init.normal_(layer.weight, std=std)


def _initialize_spatial(attention: CrossAttention, scale: float) -> None:
    """Makes queries attend to keys at the same position.

    Both are projected by the same scaled orthogonal matrix. The original Qwen-VL code does not have
    this option.
    """
    init.orthogonal_(attention.q_proj.weight, gain=scale)
    init.copy_(attention.k_proj.weight, attention.q_proj.weight)
