"""Frozen linear layers that compute in 8 bits, forwards and for the gradients of what goes in: faster on GPUs that have such products."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qwenvl_lit.optim import part_of_tensor
from qwenvl_lit.types import DataError

FORMAT = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
LARGEST = torch.finfo(FORMAT).max
ALIGNED = 16  # what the sizes of a layer have to divide by
CAPABLE = (8, 9)  # CUDA devices from here on have such products

# M rows, K numbers of an input, N of an output


class Float8Linear(nn.Module):
    """The frozen layer `layer`: (..., K) -> (..., N).

    Weights are rounded once, with one scale for all; inputs and gradients each time, with the scale that fits the tensor at hand. Outputs
    are in the precision that `layer` would give. A weight is held twice, once for each direction: that is the memory of bfloat16.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, scale = rounded(layer.weight.detach())
        # Parameters, since DDP would send buffers around in every step
        self.weight = nn.Parameter(packed, requires_grad=False)  # (N, K)
        self.transposed = nn.Parameter(packed.t().contiguous(), requires_grad=False)  # (K, N): products take their second factor by columns
        self.scale = nn.Parameter(scale, requires_grad=False)  # () float32
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat = x.reshape(-1, self.in_features)
        out = Product.apply(flat, self.weight, self.transposed, self.scale, dtype)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Product(torch.autograd.Function):
    """(M, K) times a frozen (N, K), rounded to 8 bits: (M, N)."""

    @staticmethod
    def forward(context, x, weight, transposed, scale, dtype):
        context.save_for_backward(transposed, scale)
        context.dtype = x.dtype
        return multiplied(x, weight, scale, dtype)

    @staticmethod
    def backward(context, gradient):
        transposed, scale = context.saved_tensors
        return multiplied(gradient, transposed, scale, context.dtype), None, None, None, None


def multiplied(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (M, K), rounded to 8 bits, times the transpose of the rounded `weight` (N, K) with its `scale`: (M, N)."""
    if not len(x):
        return x.new_zeros(0, len(weight), dtype=dtype)
    packed, own = rounded(x)
    return torch._scaled_mm(packed, weight.t(), scale_a=own, scale_b=scale, out_dtype=dtype, use_fast_accum=True)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in 8 bits, and the float32 () to multiply it with."""
    scale = (x.abs().amax().float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale


def to_float8(model: nn.Module, parts: Mapping[str, str]) -> int:
    """Replace the frozen linear layers of a model that has its adapter, but not its head; returns how many.

    Args:
        parts: of the family, name -> module path.

    Raises:
        DataError: there are none, or the device has no products of 8 bits.
    """
    frozen = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear  # subclasses hold their weights in other ways
        and not module.weight.requires_grad
        and part_of_tensor(f"{name}.weight", parts) != "head"
        and module.in_features % ALIGNED == module.out_features % ALIGNED == 0
    ]
    if not frozen:
        raise DataError(
            "speed.float8=true holds frozen linear layers in 8 bits, and there are none: not with adapter=full or adapter=qlora"
        )
    check_device(frozen[0][1].weight.device)
    for name, layer in frozen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Float8Linear(layer))
    return len(frozen)


def check_device(device: torch.device) -> None:
    """Raises a DataError if it has no products of 8 bits. A CPU has them, and is slow at it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABLE:
        raise DataError(f"speed.float8=true needs products of 8 bits, which {torch.cuda.get_device_name(device)} does not have")
