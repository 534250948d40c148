"""Hidden states of a network: the outputs of its blocks, by module path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qwenvl_lit.models.components import blocks_of, network_of


@torch.inference_mode()
def hidden_states(
    model: nn.Module, inputs: Mapping[str, Any], *, also: Iterable[str], only: str | None
) -> dict[str, torch.Tensor]:
    """Runs a network once and returns outputs of its modules by path, on the CPU.

    Args:
        inputs: arguments of the network's `forward`.
        also: module paths besides those of all blocks.
        only: a regular expression that a path must match as a whole; None: no choice.

    Raises:
        ValueError: no path matches `only`.
    """
    network = network_of(model)
    paths = list(dict.fromkeys([*blocks_of(network), *also]))
    chosen = [path for path in paths if only is None or re.fullmatch(only, path)]
    if not chosen:
        raise ValueError(f"only={only!r} matches no module; there are {paths[0]} to {paths[-1]}")
    states: dict[str, torch.Tensor] = {}
    hooks = []
    for path in chosen:
        hooks.append(network.get_submodule(path).register_forward_hook(_keep(states, path)))
    try:
        model(**{**inputs, "use_cache": False, "logits_to_keep": 1})
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _keep(states: dict[str, torch.Tensor], path: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: object, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        states[path] = tensor.detach().cpu()

    return keep
