"""Inputs of the vision tower besides pixels, computed on the host from the sizes of the images.

On the device, the tower would have to synchronize to know the sizes.
"""

# N images, P patches of all images

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

VisionConfig = Qwen2_5_VLVisionConfig | Qwen3VLVisionConfig


def tower_inputs(sizes: Sequence[tuple[int, int]], config: VisionConfig) -> dict[str, Any]:
    """Returns what the network needs besides `pixel_values` (P, C) for one or more images.

    There are `image_sizes`, and the arguments of the tower's `forward` with the prefix `image_`.

    Args:
        sizes: the height and width of each image in patches, both divisible by the merge size.
    """
    grids = torch.tensor([(1, height, width) for height, width in sizes])
    merge = config.spatial_merge_size
    inputs = {
        "image_sizes": tuple(sizes),
        "image_position_ids": get_vision_position_ids(grids, merge),  # (P, 2)
        "image_cu_seqlens": get_vision_cu_seqlens(grids),  # (N + 1,) int32
        "image_max_seqlen": max(height * width for height, width in sizes),
    }
    if isinstance(config, Qwen2_5_VLVisionConfig):
        index, bounds = get_vision_window_index(
            grids,
            spatial_merge_size=merge,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        return inputs | {
            "image_window_index": index,
            "image_cu_window_seqlens": bounds,
            "image_max_window_seqlen": int(bounds.diff().max()),
        }
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=isqrt(config.num_position_embeddings),
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=merge,
    )
    return inputs | {"image_interp_indices": indices, "image_interp_weights": weights}


def image_tokens(sizes: Sequence[tuple[int, int]], config: VisionConfig) -> list[int]:
    """Returns the number of tokens of each image."""
    return [height * width // config.spatial_merge_size**2 for height, width in sizes]
