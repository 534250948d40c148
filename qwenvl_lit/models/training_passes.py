"""Counts the FLOPs of a training step relative to those of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping

# Component -> components whose output is part of its input, directly or indirectly.
EARLIER_COMPONENTS: dict[str, tuple[str, ...]] = {
    "vision": (),
    "resampler": ("vision",),
    "embeddings": (),
    "language": ("vision", "resampler", "embeddings"),
    "head": ("vision", "resampler", "embeddings", "language"),
}


def training_passes(trained: Mapping[str, float]) -> dict[str, int]:
    """Returns the FLOPs of a training step relative to a forward pass, by component.

    The forward pass counts 1, the gradients of inputs 1, and the gradients of weights 1. The FLOPs
    of adapters are not counted.

    Args:
        trained: the fraction of the parameters that is trained, by component. A fraction below 0.5
            means that the component has an adapter.
    """
    passes = {}
    for component, earlier in EARLIER_COMPONENTS.items():
        has_gradients = any(trained.get(name, 0) > 0 for name in (component, *earlier))
        passes[component] = 1 + has_gradients + (trained.get(component, 0) >= 0.5)
    return passes
