"""Estimates the memory that evaluating a batch takes in addition to the weights.

The estimates follow from the sizes of a network. Those of answers are 0.2 to 0.9 GiB above the
peaks in benchmarks/generate.json.
"""

from __future__ import annotations

from qwenvl_lit.models.feature_cache import MAX_BYTES
from qwenvl_lit.models.kv_cache import round_up
from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.decoder import IMAGES_PER_PASS
from qwenvl_lit.models.static_decoder import PROMPT_TOKENS

# CUDA graphs, workspaces of libraries, a dequantized weight
WORKSPACE = 2**28
LOGIT_BYTES = 12  # of a logit: in the dtype of the weights, in float32, and a temporary copy


def answering_bytes(
    config: QwenVLConfig,
    itemsize: int,
    *,
    rows: int,
    tokens: int,
    images: int,
    new_tokens: int,
    at_once: bool,
) -> int:
    """Returns the bytes that answering a batch takes.

    Args:
        itemsize: bytes of an activation.
        tokens, images, new_tokens: upper bounds per row.
        at_once: whether all prompts are read in one pass, as transformers' `generate` does.
    """
    row_tokens = tokens + new_tokens
    if not at_once:
        row_tokens = round_up(rows, row_tokens)
    cache = rows * row_tokens * 2 * config.num_hidden_layers * config.hidden_size
    prompts = rows * tokens * config.hidden_size
    encoded = rows * images
    features = encoded * config.n_queries * config.hidden_size
    cached = min(features * itemsize, MAX_BYTES)
    pass_tokens = rows * tokens
    if not at_once:
        pass_tokens = min(pass_tokens, max(PROMPT_TOKENS, tokens))
    largest = max(
        pass_tokens * _block_elements(config),
        min(encoded, IMAGES_PER_PASS) * _image_elements(config),
    )
    elements = cache + prompts + features + largest
    logits = rows * config.vocab_size * LOGIT_BYTES
    return elements * itemsize + cached + _pixel_bytes(config, encoded) + logits + WORKSPACE


def loss_bytes(
    config: QwenVLConfig, itemsize: int, *, rows: int, tokens: int, images: int, supervised: int
) -> int:
    """Returns the bytes that the loss of a batch takes, without gradients."""
    encoded = rows * images
    features = encoded * config.n_queries * config.hidden_size
    largest = max(rows * tokens * _block_elements(config), encoded * _image_elements(config))
    logits = rows * supervised * config.vocab_size * LOGIT_BYTES
    elements = features + largest
    return elements * itemsize + _pixel_bytes(config, encoded) + logits + WORKSPACE


def _block_elements(config: QwenVLConfig) -> int:
    """Returns the elements that a block of the language model holds at a time, per token.

    There are the residual stream, queries, keys and values with their rotations in float32, and the
    branches of the MLP with their product. 128 prompts in benchmarks/generate.json took 205 KB per
    token of a pass; this gives 214.
    """
    return 10 * config.hidden_size + 3 * config.intermediate_size


def _image_elements(config: QwenVLConfig) -> int:
    """Returns the elements that a block of the vision tower, if any, holds per image."""
    visual = config.visual
    if visual is None:
        return 0
    patches = (visual["image_size"] // visual["patch_size"]) ** 2
    hidden = int(visual["width"] * visual["mlp_ratio"])
    return patches * (2 * hidden + 8 * visual["width"])


def _pixel_bytes(config: QwenVLConfig, images: int) -> int:
    """Returns the bytes of the pixels, as they are loaded and as float32."""
    if config.visual is None:
        return 0
    return images * 3 * config.visual["image_size"] ** 2 * (1 + 4)
