"""Counts the FLOPs of Qwen-VL's matmuls in a forward pass and in a training step.

A multiplication and an addition count as two FLOPs. Recomputation of activations is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.training_passes import training_passes as general_passes


def training_flops(
    config: QwenVLConfig,
    *,
    lengths: Iterable[int],
    images: int,
    targets: int,
    trained: Mapping[str, float],
) -> float:
    """Returns the FLOPs of a training step.

    Args:
        lengths: the number of tokens of each sample, without padding.
        images: the number of images.
        targets: the number of positions whose logits are computed.
        trained: see `training_passes`.
    """
    lengths = tuple(lengths)
    squares = sum(length**2 for length in lengths)
    flops = forward_flops(
        config, tokens=sum(lengths), squares=squares, images=images, targets=targets
    )
    passes = training_passes(trained)
    return sum(flops[component] * passes[component] for component in flops)


def forward_flops(
    config: QwenVLConfig, *, tokens: int, squares: int, images: int, targets: int
) -> dict[str, float]:
    """Returns the FLOPs of a forward pass by component, without those that the network lacks.

    Args:
        tokens: the number of tokens of all samples, without padding.
        squares: the sum of the squared lengths of the samples. Attention is causal, so only half of
            the pairs of tokens are counted.
        images: the number of images.
        targets: the number of positions whose logits are computed.
    """
    dim = config.hidden_size
    layer = 4 * dim**2 + 3 * dim * config.intermediate_size // 2
    flops = {
        "language": config.num_hidden_layers * (2 * layer * tokens + 2 * dim * squares),
        "head": 2.0 * dim * config.vocab_size * targets,
    }
    if config.visual is None:
        return flops
    tower, width = config.tower, config.visual["width"]
    patch, queries = config.visual["patch_size"], config.n_queries
    patches = (config.visual["image_size"] // patch) ** 2
    mlp = int(width * config.visual["mlp_ratio"])
    block = 2 * patches * (4 * width**2 + 2 * width * mlp) + 4 * patches**2 * width
    keys = 2 * patches * width * dim * (width != dim) + 4 * patches * dim**2
    return {
        "vision": images * (2 * patches * 3 * patch**2 * width + tower["layers"] * block),
        "resampler": images * (keys + 6 * queries * dim**2 + 4 * queries * patches * dim),
        **flops,
    }


def training_passes(trained: Mapping[str, float]) -> dict[str, int]:
    """Returns the FLOPs of a training step relative to a forward pass, by component.

    A resampler without any gradients counts 0, because the published figures to compare with do not
    include it.

    Args:
        trained: the fraction of the parameters that is trained, by component.
    """
    passes = general_passes(trained)
    if passes["resampler"] == 1:
        passes["resampler"] = 0
    return passes
