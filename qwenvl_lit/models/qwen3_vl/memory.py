"""Estimates the memory that evaluating a batch takes in addition to the weights.

The estimates follow from the sizes of a network.
"""

# C width of the tower, D width of the language model

from __future__ import annotations

from transformers import PreTrainedConfig

from qwenvl_lit.models.feature_cache import MAX_BYTES
from qwenvl_lit.models.kv_cache import round_up
from qwenvl_lit.models.qwen3_vl.decoder import PATCHES_PER_PASS
from qwenvl_lit.models.qwen3_vl.flops import head_dim_of
from qwenvl_lit.models.static_decoder import PROMPT_TOKENS

# CUDA graphs, workspaces of libraries, a dequantized weight
WORKSPACE = 2**28
LOGIT_BYTES = 12  # of a logit: in the dtype of the weights, in float32, and a temporary copy


def answering_bytes(
    config: PreTrainedConfig,
    itemsize: int,
    *,
    rows: int,
    tokens: int,
    image_tokens: int,
    new_tokens: int,
    at_once: bool,
) -> int:
    """Returns the bytes that answering a batch takes.

    Args:
        itemsize: bytes of an activation.
        tokens, image_tokens, new_tokens: upper bounds per row.
        at_once: whether all prompts are read, and all images encoded, in one pass, as transformers'
            `generate` does.
    """
    text = config.text_config
    row_tokens = tokens + new_tokens
    if not at_once:
        row_tokens = round_up(rows, row_tokens)
    heads = text.num_key_value_heads * head_dim_of(text)
    cache = rows * row_tokens * 2 * text.num_hidden_layers * heads
    prompts = rows * tokens * text.hidden_size
    features = rows * image_tokens * _feature_width(config)
    pass_tokens, pass_patches = rows * tokens, rows * _patches(config, image_tokens)
    cached = 0
    if not at_once:
        pass_tokens = min(pass_tokens, max(PROMPT_TOKENS, tokens))
        pass_patches = min(pass_patches, max(PATCHES_PER_PASS, _patches(config, image_tokens)))
        cached = min(features * itemsize, MAX_BYTES)
    largest = max(pass_tokens * _block_elements(config), pass_patches * _tower_elements(config))
    elements = cache + prompts + features + largest
    pixels = rows * _pixel_bytes(config, image_tokens, itemsize)
    logits = rows * text.vocab_size * LOGIT_BYTES
    return elements * itemsize + cached + pixels + logits + WORKSPACE


def loss_bytes(
    config: PreTrainedConfig,
    itemsize: int,
    *,
    rows: int,
    tokens: int,
    image_tokens: int,
    supervised: int,
) -> int:
    """Returns the bytes that the loss of a batch takes, without gradients.

    Args:
        tokens, image_tokens, supervised: upper bounds per row.
    """
    features = rows * image_tokens * _feature_width(config)
    largest = max(
        rows * tokens * _block_elements(config),
        rows * _patches(config, image_tokens) * _tower_elements(config),
    )
    logits = rows * supervised * config.text_config.vocab_size * LOGIT_BYTES
    pixels = rows * _pixel_bytes(config, image_tokens, itemsize)
    return (features + largest) * itemsize + pixels + logits + WORKSPACE


def _feature_width(config: PreTrainedConfig) -> int:
    """Returns the elements of an image token, with those of all DeepStack levels."""
    levels = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    return (1 + levels) * config.text_config.hidden_size


def _patches(config: PreTrainedConfig, image_tokens: int) -> int:
    return image_tokens * config.vision_config.spatial_merge_size**2


def _block_elements(config: PreTrainedConfig) -> int:
    """Returns the elements that a block of the language model holds at a time, per token.

    There are the residual stream and its norm in float32, queries, keys and values with their
    rotations, and the branches of the MLP with their product.
    """
    text = config.text_config
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    return 6 * text.hidden_size + 4 * heads * head_dim_of(text) + 3 * text.intermediate_size


def _tower_elements(config: PreTrainedConfig) -> int:
    """Returns the elements that a block of the vision tower holds at a time, per patch.

    Queries and keys are rotated in float32.
    """
    vision = config.vision_config
    return 3 * vision.intermediate_size + 16 * vision.hidden_size


def _pixel_bytes(config: PreTrainedConfig, image_tokens: int, itemsize: int) -> int:
    """Returns the bytes of the pixels, as loaded, as float32 and in the dtype of the weights."""
    vision = config.vision_config
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return _patches(config, image_tokens) * pixels * (1 + 4 + itemsize)
