"""Frozen linear layers that compute in 8 bits, forwards and for the gradients of what goes in: faster on GPUs that have such products."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from torch import nn

from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.types import DataError

FORMAT = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
LARGEST = torch.finfo(FORMAT).max
ALIGNED = 16  # what the sizes of a layer have to divide by
CAPABLE = (8, 9)  # CUDA devices from here on have such products
log = logging.getLogger(__name__)

# M rows, K numbers of an input, N of an output


class Float8Linear(nn.Module):
    """The frozen layer `layer`: (..., K) -> (..., N).

    Weights are rounded once, with one scale for all; inputs and gradients each time, with the scale that fits the tensor at hand. Outputs
    are in the precision that `layer` would give. A weight is held twice, once for each direction: that is the memory of bfloat16.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, self.scale = rounded(layer.weight.detach())  # the scale: () float32
        # Bytes, since gloo sends no numbers of 8 bits and a change of precision would cast them; no buffer, DDP sends those in every step
        self.packed = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self._lay_out()

    def _lay_out(self) -> None:
        self.weight = self.packed.detach().view(FORMAT)  # (N, K), the same memory
        self.transposed = (
            self.weight.t().contiguous()
        )  # (K, N): products on a GPU take their second factor by columns only

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # to another device, as all of a model
        self.scale = self.scale.to(self.packed.device)
        self._lay_out()
        return self

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


def multiplied(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x (M, K), rounded to 8 bits, times the transpose of the rounded `weight` (N, K) with its `scale`: (M, N)."""
    if not len(x):
        return x.new_zeros(0, len(weight), dtype=dtype)
    product = scaled_product if x.is_cuda else plain_product
    return product(*rounded(x), weight, scale, dtype)


def scaled_product(x, x_scale, weight, weight_scale, dtype):
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=dtype, use_fast_accum=True
    )


def plain_product(x, x_scale, weight, weight_scale, dtype):
    """The same for a CPU, hundreds of times faster there: the numbers are those of 8 bits, the sums of more."""
    return (x.float() @ weight.float().t() * (x_scale * weight_scale)).to(dtype)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in 8 bits, and the float32 () to multiply it with."""
    scale = (x.abs().amax().float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FORMAT), scale


def to_float8(
    model: nn.Module, components: Mapping[str, str], *, but: Collection[str] = ("head",)
) -> int:
    """Replace the frozen linear layers of a model that has its adapter, one by one; returns how many.

    Args:
        parts: of the family, name -> module path.
        but: parts that stay as they are.

    Raises:
        DataError: there are none, or the device has no products of 8 bits.
    """
    modules = dict(model.named_modules())
    # Variants of peft's adapters, as DoRA, look at the weight of their layer themselves
    looked_at = {
        f"{name}.base_layer"
        for name, module in modules.items()
        if getattr(module, "lora_variant", None)
    }
    names = [
        name
        for name, module in modules.items()
        if _fits(module) and component_of_tensor(f"{name}.weight", components) not in but
    ]
    names = [name for name in names if name not in looked_at]
    if not names:
        raise DataError(
            "speed.float8=true is for frozen linear layers, and there are none: not with adapter=full or adapter=qlora; adapter=lora "
            "leaves its base frozen"
        )
    check_device(modules[names[0]].weight.device)
    del modules  # each layer goes when its successor is there
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Float8Linear(model.get_submodule(name)))
    return len(names)


def _fits(module: nn.Module) -> bool:
    """Whether it is a frozen linear layer of sizes that can be computed in 8 bits; subclasses hold their weights in other ways."""
    frozen = type(module) is nn.Linear and not module.weight.requires_grad
    return frozen and module.in_features % ALIGNED == module.out_features % ALIGNED == 0


def check_device(device: torch.device) -> None:
    """Raises a DataError if it is a GPU without products of 8 bits. A CPU does without them, to try what they change; a warning says so."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABLE:
        raise DataError(
            f"speed.float8=true needs products of 8 bits, which {torch.cuda.get_device_name(device)} does not have"
        )
    if device.type == "cpu":
        log.warning(
            "a CPU only imitates the numbers of 8 bits, and is slower than without them: speed=fp8 is for GPUs that have such products"
        )
