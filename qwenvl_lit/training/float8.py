"""Frozen linear layers with FP8 matmuls, for the forward pass and for input gradients.

Faster on GPUs with FP8 tensor cores. torchao.float8 is for layers that train: it quantizes their
weights in every step and computes weight gradients. A frozen weight is quantized once, here.
"""

# M rows, K input features, N output features

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from torch import nn

from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.types import DataError

FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
FP8_MAX = torch.finfo(FP8).max
ALIGNMENT = 16  # both sizes of a layer must be multiples of this
MIN_CAPABILITY = (8, 9)  # lowest compute capability with FP8 matmuls
log = logging.getLogger(__name__)


class Float8Linear(nn.Module):
    """The frozen layer `layer` with FP8 matmuls: (..., K) -> (..., N).

    The weight is quantized once, with a single scale. Inputs and gradients are quantized in every
    call, with the scale that fits the tensor. The output has the dtype that `layer` would give.
    The weight is stored twice, once for each direction, in as much memory as in bfloat16.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, self.scale = quantize(layer.weight.detach())  # the scale: () float32
        # Stored as uint8: gloo cannot send FP8, and `.to(dtype)` would cast it. A parameter, not a
        # buffer: DDP broadcasts buffers every step.
        self.packed = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self._set_weights()

    def _set_weights(self) -> None:
        self.weight = self.packed.detach().view(FP8)  # (N, K), the same memory
        # (K, N). FP8 matmuls on a GPU take their second operand in column-major order only.
        self.transposed = self.weight.t().contiguous()

    def _apply(self, fn, recurse=True):
        """Moves the layer to another device with the rest of a model.

        `Module.to` calls this private method. There is no public hook for tensors that are neither
        parameters nor buffers; torch's own recurrent layers override this method, too.
        """
        super()._apply(fn, recurse)
        self.scale = self.scale.to(self.packed.device)
        self._set_weights()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.reshape(-1, self.in_features)
        out = Float8Matmul.apply(flat, self.weight, self.transposed, self.scale, dtype)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class Float8Matmul(torch.autograd.Function):
    """(M, K), quantized to FP8, times a frozen FP8 weight (N, K): (M, N)."""

    @staticmethod
    def forward(context, x, weight, transposed, scale, dtype):
        context.save_for_backward(transposed, scale)
        context.dtype = x.dtype
        return quantized_matmul(x, weight, scale, dtype)

    @staticmethod
    def backward(context, gradient):
        transposed, scale = context.saved_tensors
        x_gradient = quantized_matmul(gradient, transposed, scale, context.dtype)
        return x_gradient, None, None, None, None


def quantized_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Quantizes x (M, K) and multiplies it with the transpose of `weight` (N, K): (M, N).

    Args:
        weight: in FP8.
        scale: that of `weight`.
        dtype: of the result.
    """
    if not len(x):
        return x.new_zeros(0, len(weight), dtype=dtype)
    matmul = scaled_matmul if x.is_cuda else emulated_matmul
    return matmul(*quantize(x), weight, scale, dtype)


def scaled_matmul(x, x_scale, weight, weight_scale, dtype):
    # Private, but what torch.compile and torchao use; `test_float8.py` fails when it changes
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=dtype, use_fast_accum=True
    )


def emulated_matmul(x, x_scale, weight, weight_scale, dtype):
    """`scaled_matmul` for a CPU, where it is hundreds of times faster.

    The operands are FP8 values; the sums are more precise.
    """
    return (x.float() @ weight.float().t() * (x_scale * weight_scale)).to(dtype)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x in FP8, and the scale () float32 by which to multiply it."""
    scale = (x.abs().amax().float() / FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def to_float8(
    model: nn.Module, components: Mapping[str, str], *, exclude: Collection[str] = ("head",)
) -> int:
    """Replaces the frozen linear layers of a model one by one; returns their number.

    Args:
        model: a model that has its adapter.
        components: component -> module path, of the family.
        exclude: components that stay as they are.

    Raises:
        DataError: there are no such layers, or the device has no FP8 matmuls.
    """
    names = _names_to_replace(model, components, exclude)
    if not names:
        raise DataError(
            "speed.float8=true is for frozen linear layers, and there are none; adapter=full and "
            "adapter=qlora have none, adapter=lora leaves its base frozen"
        )
    check_device(model.get_submodule(names[0]).weight.device)
    for name in names:
        # Nothing else refers to a layer, so it is freed before the next one is quantized
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Float8Linear(model.get_submodule(name)))
    return len(names)


def _names_to_replace(
    model: nn.Module, components: Mapping[str, str], exclude: Collection[str]
) -> list[str]:
    # Variants of peft's adapters such as DoRA read the weight of the layer that they wrap
    weight_is_read = set()
    for name, module in model.named_modules():
        if getattr(module, "lora_variant", None):
            weight_is_read.add(f"{name}.base_layer")
    names = []
    for name, module in model.named_modules():
        component = component_of_tensor(f"{name}.weight", components)
        if _can_replace(module) and name not in weight_is_read and component not in exclude:
            names.append(name)
    return names


def _can_replace(module: nn.Module) -> bool:
    """Whether this is a frozen linear layer whose sizes allow FP8 matmuls.

    Subclasses of `nn.Linear` store their weights differently.
    """
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return False
    return module.in_features % ALIGNMENT == module.out_features % ALIGNMENT == 0


def check_device(device: torch.device) -> None:
    """Refuses a GPU without FP8 matmuls. On a CPU FP8 is emulated, for testing, with a warning.

    Raises:
        DataError: the device is such a GPU.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        lowest = ".".join(map(str, MIN_CAPABILITY))
        raise DataError(
            f"speed.float8=true needs a GPU with FP8 matmuls (compute capability {lowest} or "
            f"higher), which {torch.cuda.get_device_name(device)} does not have"
        )
    if device.type == "cpu":
        log.warning(
            "a CPU only emulates FP8 and is slower with it; speed=fp8 is for GPUs with FP8 matmuls"
        )
