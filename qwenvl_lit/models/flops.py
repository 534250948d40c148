"""How much work a pass through Qwen-VL is: matrix products, a multiplication and an addition each; what is recomputed is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

from qwenvl_lit.models.config import QwenVLConfig

Count = TypeVar("Count", float, torch.Tensor)  # tensors where they are counted on a device


def training_flops(
    config: QwenVLConfig,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    pictures: int,
    targets: int,
    trained: Mapping[str, float],
) -> torch.Tensor:
    """Operations of a training step, () float64 on the device of the rows.

    Args:
        attention_mask: (B, T) of padded rows; None for packed ones, which restarting `position_ids` (1, T) tell apart.
        targets: positions that have logits.
        trained: see `training_passes`.
    """
    if attention_mask is None:
        assert position_ids is not None
        lengths = (2 * position_ids + 1).double()  # 1 + 3 + 5 + ... is the square of their number
        tokens, squares = lengths.new_tensor(float(lengths.numel())), lengths.sum()
    else:
        lengths = attention_mask.sum(1).double()
        tokens, squares = lengths.sum(), lengths.square().sum()
    work = forward_flops(config, tokens=tokens, squares=squares, pictures=pictures, targets=targets)
    passes = training_passes(trained)
    return sum((work[part] * passes[part] for part in work), start=torch.zeros_like(tokens))


def forward_flops(config: QwenVLConfig, *, tokens: Count, squares: Count, pictures: int, targets: int) -> dict[str, Count | float]:
    """Operations of a forward pass, by part.

    Args:
        tokens: of all samples, padding left out.
        squares: the sum of the squares of the samples' lengths. Attention is causal, so that half of the pairs count.
        targets: positions that have logits.
    """
    tower, width, dim = config.tower, config.visual["width"], config.hidden_size
    patch, queries = config.visual["patch_size"], config.n_queries
    patches = (config.visual["image_size"] // patch) ** 2
    mlp = int(width * config.visual["mlp_ratio"])
    block = 2 * patches * (4 * width**2 + 2 * width * mlp) + 4 * patches**2 * width
    keys = 2 * patches * width * dim * (width != dim) + 4 * patches * dim**2
    layer = 4 * dim**2 + 3 * dim * config.intermediate_size // 2
    return {
        "vision": pictures * (2 * patches * 3 * patch**2 * width + tower["layers"] * block),
        "resampler": pictures * (keys + 6 * queries * dim**2 + 4 * queries * patches * dim),
        "language": config.num_hidden_layers * (2 * layer * tokens + 2 * dim * squares),
        "head": 2.0 * dim * config.vocab_size * targets,
    }


def training_passes(trained: Mapping[str, float]) -> dict[str, int]:
    """How many times the work of a forward pass each part does in a step: once more where gradients flow through it, and once more where
    its own weights get them. An adapter's own work is not counted.

    Frozen, the resampler is not counted: so do the rates that these are compared with.

    Args:
        trained: for each part, the share of its numbers that is trained; an adapter is less than half.
    """
    order: dict[str, tuple[str, ...]] = {"vision": (), "resampler": ("vision",), "embeddings": ()}  # and what comes before each
    order["language"] = ("vision", "resampler", "embeddings")
    order["head"] = (*order["language"], "language")
    passes = {}
    for part, before in order.items():
        flows = any(trained.get(one, 0) > 0 for one in (part, *before))
        passes[part] = 1 + flows + (trained.get(part, 0) >= 0.5)
    if passes["resampler"] == 1:
        passes["resampler"] = 0
    return passes
