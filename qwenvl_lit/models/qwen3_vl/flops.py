"""Counts the FLOPs of the matmuls of Qwen2.5-VL and Qwen3-VL.

A multiplication and an addition count as two FLOPs. Recomputation of activations is not counted.
"""

# C width of the tower, D width of the language model

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from qwenvl_lit.models.training_passes import training_passes


def training_flops(
    config: PreTrainedConfig,
    *,
    lengths: Iterable[int],
    image_sizes: Sequence[tuple[int, int]],
    targets: int,
    trained: Mapping[str, float],
) -> float:
    """Returns the FLOPs of a training step.

    Args:
        lengths: the number of tokens of each sample, without padding.
        image_sizes: the height and width of each image in patches.
        targets: the number of positions whose logits are computed.
        trained: see `training_passes`.
    """
    flops = forward_flops(config, lengths=lengths, image_sizes=image_sizes, targets=targets)
    passes = training_passes(trained)
    return sum(flops[component] * passes[component] for component in flops)


def forward_flops(
    config: PreTrainedConfig,
    *,
    lengths: Iterable[int],
    image_sizes: Sequence[tuple[int, int]],
    targets: int,
) -> dict[str, float]:
    """Returns the FLOPs of a forward pass by component.

    Attention of the language model is causal, so only half of the pairs of tokens are counted.
    """
    text = config.text_config
    lengths = tuple(lengths)
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    queries = text.num_attention_heads * head_dim_of(text)
    keys = text.num_key_value_heads * head_dim_of(text)
    layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    return {
        **_tower_flops(config.vision_config, image_sizes),
        "language": text.num_hidden_layers * (2.0 * layer * tokens + 2 * queries * squares),
        "head": 2.0 * text.hidden_size * text.vocab_size * targets,
    }


def head_dim_of(text: PreTrainedConfig) -> int:
    """Returns the width of an attention head of the language model."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _tower_flops(config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Returns the FLOPs of the tower and of its last merger, which is the resampler."""
    depth, dim = config.depth, config.hidden_size
    areas = [height * width for height, width in sizes]
    patches, pairs = sum(areas), depth * sum(area**2 for area in areas)
    matrices, levels = 2, 0  # of an MLP, and of DeepStack, each with a merger
    if isinstance(config, Qwen2_5_VLVisionConfig):
        matrices = 3
        full = len(config.fullatt_block_indexes)
        windows = sum(_pairs_in_windows(size, config) for size in sizes)
        pairs = full * sum(area**2 for area in areas) + (depth - full) * windows
    else:
        levels = len(config.deepstack_visual_indexes)
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    block = 4 * dim**2 + matrices * dim * config.intermediate_size
    merge = config.spatial_merge_size**2  # patches of a token
    merger = 2.0 * patches * dim * (merge * dim + config.out_hidden_size)
    tower = 2.0 * patches * (pixels * dim + depth * block) + 4 * pairs * dim
    return {"vision": tower + levels * merger, "resampler": merger}


def _pairs_in_windows(size: tuple[int, int], config: PreTrainedConfig) -> int:
    """Returns the number of pairs of patches of an image that are in the same window."""
    side = config.window_size // config.patch_size  # of a window, in patches
    pairs = 1
    for length in size:
        whole, rest = divmod(length, side)
        pairs *= whole * side**2 + rest**2
    return pairs
