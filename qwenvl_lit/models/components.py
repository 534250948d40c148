"""Finds the network inside adapters, the component of a tensor, and the blocks of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def network_of(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside peft's wrappers, or `model` itself without wrappers.

    The module paths in `Family.components` are relative to this network.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def component_of_tensor(name: str, components: Mapping[str, str]) -> str | None:
    """Returns the component that contains a tensor, or None if no component does.

    If components are nested, returns the innermost one.

    Args:
        name: the name of the tensor, with or without the prefixes that wrappers add.
        components: component -> module path.

    >>> components = {"vision": "transformer.visual", "resampler": "transformer.visual.attn_pool"}
    >>> component_of_tensor("base_model.model.transformer.visual.attn_pool.ln_q.weight", components)
    'resampler'
    """
    containing = [key for key, path in components.items() if f".{path}." in f".{name}"]
    return max(containing, key=lambda key: len(components[key]), default=None)


def blocks_of(model: nn.Module) -> dict[str, GradientCheckpointingLayer]:
    """Returns the transformer blocks of a model by module path, in the order of `named_modules`."""
    blocks = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            blocks[path] = module
    return blocks


def replace_method(module: nn.Module, name: str, function: Callable[..., Any] | None) -> None:
    """Replaces the method `name` of `module` by `function`. With None, restores the method.

    All methods that this project replaces are replaced by this function: the `compute` method of
    blocks to compile it, and the `forward` method of the vision tower to record it as a CUDA graph.
    The alternatives have drawbacks:

    - A module that wraps the block would change the names of its parameters.
    - `nn.Module.compile()` would put FSDP's hooks and transformers' checkpointing into the graph.

    Raises:
        TypeError: the class of `module` does not have this method.
    """
    if not hasattr(type(module), name):
        raise TypeError(f"{type(module).__name__} has no method `{name}` to replace")
    if function is not None:
        setattr(module, name, function)
    elif name in vars(module):
        delattr(module, name)
