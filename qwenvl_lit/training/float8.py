"""Frozen linear layers with FP8 matmuls in the forward pass and for input gradients.

They are faster on GPUs with FP8 tensor cores. torchao.float8 is made for layers that are trained:
it quantizes their weights in every step and computes weight gradients. `Float8Linear` quantizes its
frozen weight only once.
"""

# M tokens, K input features, N output features

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from torch import nn

from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.types import DataError

FP8 = torch.float8_e4m3fn  # 4 bits for the exponent, 3 bits for the mantissa
FP8_MAX = torch.finfo(FP8).max
ALIGNMENT = 16  # both sizes of a layer must be multiples of this
MIN_CAPABILITY = (8, 9)  # lowest CUDA compute capability with FP8 matmuls
log = logging.getLogger(__name__)


class Float8Linear(nn.Module):
    """Replaces a frozen `nn.Linear` by a layer with FP8 matmuls, (..., K) -> (..., N).

    The weight is quantized once, with a single scale. Inputs and gradients are quantized in every
    call, each with the scale of its largest element. The output has the dtype that `layer` would
    return. The weight is stored twice, for the forward and for the backward pass. This takes as
    much memory as the weight in bfloat16.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, self.scale = quantize(layer.weight.detach())  # scale: () float32
        # Stored as uint8, because gloo cannot send FP8 and `.to(dtype)` would cast it.
        # It is a parameter and not a buffer, because DDP broadcasts buffers in every step.
        self.packed = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self._set_weights()

    def _set_weights(self) -> None:
        self.weight = self.packed.detach().view(FP8)  # (N, K), a view of `packed`
        # (K, N). FP8 matmuls on GPUs accept their second operand in column-major order only.
        self.transposed = self.weight.t().contiguous()

    def _apply(self, fn, recurse=True):
        """Moves the layer to another device together with its model.

        `Module.to` calls this private method. torch has no public hook for tensors that are neither
        parameters nor buffers, and its own recurrent layers override this method as well.
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
    """Quantizes x (M, K) and multiplies it by a frozen FP8 weight (N, K), which gives (M, N)."""

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
    """Quantizes x (M, K), multiplies it by the transpose of `weight` (N, K) and returns (M, N).

    Args:
        weight: an FP8 weight.
        scale: the scale of `weight`.
        dtype: the dtype of the result.
    """
    if not len(x):
        return x.new_zeros(0, len(weight), dtype=dtype)
    matmul = scaled_matmul if x.is_cuda else emulated_matmul
    return matmul(*quantize(x), weight, scale, dtype)


def scaled_matmul(x, x_scale, weight, weight_scale, dtype):
    # A private function, which torch.compile and torchao use as well. `test_float8.py` fails if it
    # changes.
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=dtype, use_fast_accum=True
    )


def emulated_matmul(x, x_scale, weight, weight_scale, dtype):
    """Emulates `scaled_matmul` on a CPU, hundreds of times faster than `torch._scaled_mm` there.

    The operands are the same FP8 values, and the sums are more precise.
    """
    return (x.float() @ weight.float().t() * (x_scale * weight_scale)).to(dtype)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x (M, K) in FP8, and the scale () float32 by which to multiply it to get x."""
    # By rows first: K is fixed where M is dynamic, so that the compiler can fuse this reduction
    # with what computes x, and needs no masks.
    largest = x.abs().amax(-1).amax()
    scale = (largest.float() / FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def to_float8(
    model: nn.Module, components: Mapping[str, str], *, exclude: Collection[str] = ("head",)
) -> int:
    """Replaces the frozen linear layers of a model by `Float8Linear`, and returns their number.

    Args:
        model: a model with its adapter.
        components: component -> module path, see `Family.components`.
        exclude: components whose layers are not replaced.

    Raises:
        DataError: the model has no frozen linear layers, or the device has no FP8 matmuls.
    """
    names = _names_to_replace(model, components, exclude)
    if not names:
        raise DataError(
            "speed.float8=true is for frozen linear layers, and this model has none. Models with "
            "adapter=full and adapter=qlora have none; with adapter=lora, base weights are frozen"
        )
    check_device(model.get_submodule(names[0]).weight.device)
    for name in names:
        # There is no other reference to the layer: it is freed before the next one is quantized.
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Float8Linear(model.get_submodule(name)))
    return len(names)


def _names_to_replace(
    model: nn.Module, components: Mapping[str, str], exclude: Collection[str]
) -> list[str]:
    # Variants of peft's adapters, such as DoRA, read the weight of the layer that they wrap.
    read_by_adapters = set()
    for name, module in model.named_modules():
        if getattr(module, "lora_variant", None):
            read_by_adapters.add(f"{name}.base_layer")
    names = []
    for name, module in model.named_modules():
        component = component_of_tensor(f"{name}.weight", components)
        if _can_replace(module) and name not in read_by_adapters and component not in exclude:
            names.append(name)
    return names


def _can_replace(module: nn.Module) -> bool:
    """Returns whether `module` is a frozen linear layer whose sizes allow FP8 matmuls.

    Subclasses of `nn.Linear` are not replaced, because they may store their weights differently.
    """
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return False
    return module.in_features % ALIGNMENT == module.out_features % ALIGNMENT == 0


def check_device(device: torch.device) -> None:
    """Checks that the device has FP8 matmuls. On a CPU, logs a warning that FP8 is emulated.

    Raises:
        DataError: the device is a GPU without FP8 matmuls.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        lowest = ".".join(map(str, MIN_CAPABILITY))
        raise DataError(
            f"speed.float8=true needs a GPU with FP8 matmuls (compute capability {lowest} or "
            f"higher), which {torch.cuda.get_device_name(device)} does not have"
        )
    if device.type == "cpu":
        log.warning(
            "a CPU only emulates FP8 and is slower with it; use speed=fp8 on GPUs with FP8 matmuls"
        )
