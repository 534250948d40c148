"""How much work a pass through Qwen-VL is: matrix products, a multiplication and an addition each; what is recomputed is not counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig


def training_flops(
    config: QwenVLConfig,
    *,
    lengths: Iterable[int],
    images: int,
    targets: int,
    trained: Mapping[str, float],
) -> float:
    """Operations of a training step.

    Args:
        lengths: tokens of each sample, however they are padded or packed.
        targets: positions that have logits.
        trained: see `training_passes`.
    """
    lengths = tuple(lengths)
    squares = sum(length**2 for length in lengths)
    work = forward_flops(
        config, tokens=sum(lengths), squares=squares, images=images, targets=targets
    )
    passes = training_passes(trained)
    return sum(work[part] * passes[part] for part in work)


def forward_flops(
    config: QwenVLConfig, *, tokens: int, squares: int, images: int, targets: int
) -> dict[str, float]:
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
        "vision": images * (2 * patches * 3 * patch**2 * width + tower["layers"] * block),
        "resampler": images * (keys + 6 * queries * dim**2 + 4 * queries * patches * dim),
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
    order: dict[str, tuple[str, ...]] = {
        "vision": (),
        "resampler": ("vision",),
        "embeddings": (),
    }  # and what comes before each
    order["language"] = ("vision", "resampler", "embeddings")
    order["head"] = (*order["language"], "language")
    passes = {}
    for part, before in order.items():
        flows = any(trained.get(one, 0) > 0 for one in (part, *before))
        passes[part] = 1 + flows + (trained.get(part, 0) >= 0.5)
    if passes["resampler"] == 1:
        passes["resampler"] = 0
    return passes
