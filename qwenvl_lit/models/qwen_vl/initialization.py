"""The initial weights of a Qwen-VL network, where they differ from transformers' defaults."""

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
    """Initializes the weights of `module` as the original code does.

    It follows transformers' own `_init_weights` (linear layers and embeddings: normal with
    `initializer_range`; norms: ones; biases: zeros). Children come before their parents. The
    functions of `transformers.initialization` leave tensors alone that were loaded from a file.
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
        gain = math.sqrt(0.5)  # Xavier of the three projections as one matrix
        for layer in (module.v_proj, module.q_proj, module.k_proj):
            init.xavier_uniform_(layer.weight, gain)


def _initialize_residual(layer: nn.Linear, config: QwenVLConfig) -> None:
    """GPT-2's smaller weights for layers that add to the residual stream.

    The original divides by the number of language blocks, in the vision tower too.
    """
    std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    init.normal_(layer.weight, std=std)


def _initialize_spatial(attention: CrossAttention, scale: float) -> None:
    """An option of ours: queries and keys are projected by the same scaled orthogonal matrix, so
    that equal positions attract each other."""
    init.orthogonal_(attention.q_proj.weight, gain=scale)
    init.copy_(attention.k_proj.weight, attention.q_proj.weight)
