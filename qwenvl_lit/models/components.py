"""Finding one's way in a network: inside adapters, by component, by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def network_of(model: nn.Module) -> nn.Module:
    """The transformers model inside peft's wrappers, or `model` itself if it has none.

    The module paths in `Family.components` start at this network.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def component_of_tensor(name: str, components: Mapping[str, str]) -> str | None:
    """The component that contains a tensor, the innermost if they are nested; None if none does.

    Args:
        name: the tensor's name; wrappers may have added a prefix.
        components: component -> module path.

    >>> components = {"vision": "transformer.visual", "resampler": "transformer.visual.attn_pool"}
    >>> component_of_tensor("base_model.model.transformer.visual.attn_pool.ln_q.weight", components)
    'resampler'
    """
    containing = [key for key, path in components.items() if f".{path}." in f".{name}"]
    return max(containing, key=lambda key: len(components[key]), default=None)


def blocks_of(model: nn.Module) -> dict[str, GradientCheckpointingLayer]:
    """The transformer blocks of a model by module path, in the order of `named_modules`."""
    blocks = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            blocks[path] = module
    return blocks


def replace_method(module: nn.Module, name: str, function: Callable[..., Any] | None) -> None:
    """Makes `module` call `function` in place of its method `name`; None restores the method.

    Methods of modules are replaced here and nowhere else: a block's `compute`, to compile it, and
    the vision tower's `forward`, to record it as a CUDA graph. There is no better hook for this:

    - A module around the block would change the names of its parameters.
    - `nn.Module.compile()` would put FSDP's hooks and transformers' checkpointing into the graph.

    Raises:
        TypeError: the class has no such method.
    """
    if not hasattr(type(module), name):
        raise TypeError(f"{type(module).__name__} has no method `{name}` that could be replaced")
    if function is not None:
        setattr(module, name, function)
    elif name in vars(module):
        delattr(module, name)
