"""A network that adapters may be around."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def network_of(model: nn.Module) -> nn.Module:
    """`model` itself, or what peft has put inside of it: module paths of a family's parts count from here."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def component_of_tensor(name: str, components: Mapping[str, str]) -> str | None:
    """The part, of those in `components` (name -> module path), that a tensor belongs to; of several, the innermost. Wrappers may add a prefix.

    >>> parts = {"vision": "transformer.visual", "resampler": "transformer.visual.attn_pool"}
    >>> component_of_tensor("base_model.model.transformer.visual.attn_pool.ln_q.weight", parts)
    'resampler'
    """
    inside = [part for part, path in components.items() if f".{path}." in f".{name}"]
    return max(inside, key=lambda part: len(components[part]), default=None)
