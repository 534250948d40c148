"""The work of a pass through Qwen-VL, in floating-point operations of its matmuls.

A multiplication and an addition are two operations. Recomputed activations are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig

# Components, and those whose output reaches their input.
EARLIER_COMPONENTS: dict[str, tuple[str, ...]] = {
    "vision": (),
    "resampler": ("vision",),
    "embeddings": (),
    "language": ("vision", "resampler", "embeddings"),
    "head": ("vision", "resampler", "embeddings", "language"),
}


def training_flops(
    config: QwenVLConfig,
    *,
    lengths: Iterable[int],
    images: int,
    targets: int,
    trained: Mapping[str, float],
) -> float:
    """Returns the operations of a training step.

    Args:
        lengths: tokens of each sample, whether padded or packed.
        targets: positions whose logits are computed.
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
    """Returns the operations of a forward pass by component.

    Args:
        tokens: of all samples, without padding.
        squares: the sum of the squares of the samples' lengths. Attention is causal, so half of the
            pairs of tokens count.
        targets: positions whose logits are computed.
    """
    tower, width, dim = config.tower, config.visual["width"], config.hidden_size
    patch, queries = config.visual["patch_size"], config.n_queries
    patches = (config.visual["image_size"] // patch) ** 2
    mlp = int(width * config.visual["mlp_ratio"])
    block = 2 * patches * (4 * width**2 + 2 * width * mlp) + 4 * patches**2 * width
    keys = 2 * patches * width * dim * (width != dim) + 4 * patches * dim**2
    layer = 4 * dim**2 + 3 * dim * config.intermediate_size // 2
    return {
        "vision": images * (2 * patches * 3 * patch**2 * width + tower["layers"] * block),
        "resampler": images * (keys + 6 * queries * dim**2 + 4 * queries * patches * dim),
        "language": config.num_hidden_layers * (2 * layer * tokens + 2 * dim * squares),
        "head": 2.0 * dim * config.vocab_size * targets,
    }


def training_passes(trained: Mapping[str, float]) -> dict[str, int]:
    """Returns how often a training step does the work of each component's forward pass.

    The forward pass counts once, a backward pass to the inputs once more, and one to the weights
    once more. An adapter's own work is not counted. Neither is a resampler that no gradient passes
    through, because the rates that these figures are compared with do not count it.

    Args:
        trained: for each component, the share of its parameters that is trained. A share below one
            half is an adapter.
    """
    passes = {}
    for component, earlier in EARLIER_COMPONENTS.items():
        reached = any(trained.get(name, 0) > 0 for name in (component, *earlier))
        passes[component] = 1 + reached + (trained.get(component, 0) >= 0.5)
    if passes["resampler"] == 1:
        passes["resampler"] = 0
    return passes
