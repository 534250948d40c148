"""4-bit layers that multiply with dequantized weights while many rows are answered.

bitsandbytes multiplies one row as fast as a bfloat16 layer does. With more rows it dequantizes the
weight each time, and takes 2.8 to 3.1 times as long (benchmarks/four_bit.json).
"""

# N output features, K input features

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import copy
from types import MethodType

import torch
from torch import nn
from torch.nn.functional import linear

from qwenvl_lit.models.components import replace_method

WEIGHT = "dequantized_weight"  # the attribute of a layer that holds its weight (N, K)


class DequantizedWeights:
    """Dequantizes the weights of layers, and keeps them until it is released or deleted.

    The values are those with which bitsandbytes multiplies, in the dtype in which the layers
    compute. Modules, parameters and state dict of the model do not change, and an adapter around a
    layer works as before.

    Args:
        layers: see `four_bit_layers`.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.release = weakref.finalize(self, _restore, layers)
        self.release.atexit = False
        # Outside inference mode: the layers may be used with gradients before they are released.
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers:
                setattr(layer, WEIGHT, _dequantize(layer))
                # All layers share a function, so that all blocks share a compiled graph.
                replace_method(layer, "forward", MethodType(_forward, layer))


def four_bit_layers(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """Returns the 4-bit linear layers of bitsandbytes in a module of a model."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return []
    from bitsandbytes.nn import Linear4bit

    layers = []
    for layer in module.modules():
        if isinstance(layer, Linear4bit) and layer.compute_dtype is not None:
            layers.append(layer)
    return layers


def dequantized_bytes(layers: Sequence[nn.Module]) -> int:
    """Returns the bytes that `DequantizedWeights` of these layers takes."""
    elements = 0
    for layer in layers:
        elements += layer.in_features * layer.out_features * layer.compute_dtype.itemsize
    return elements


def free_bytes(device: torch.device) -> int:
    """Returns the bytes of a GPU that tensors can take; 0 for other devices."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _dequantize(layer: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = copy(layer.weight.quant_state)
    state.dtype = layer.compute_dtype  # to which bitsandbytes casts the input
    return dequantize_4bit(layer.weight.data, state)


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Replaces the method `forward` of a 4-bit layer, which ignores autocast as well."""
    weight = getattr(layer, WEIGHT)
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _restore(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        replace_method(layer, "forward", None)
        vars(layer).pop(WEIGHT, None)
