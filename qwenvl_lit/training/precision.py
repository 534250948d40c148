"""The dtypes of training: which choices work together, and loss scaling for float16."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from qwenvl_lit.training.strategies import sharding_of
from qwenvl_lit.types import DataError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT16 = ("16", "16-mixed")  # what Lightning calls float16 autocast
INITIAL_SCALE = 2.0**10
GROWTH_STEPS = 1000  # finite steps after which the scale is doubled


class Float16Precision(MixedPrecision):
    """float16 autocast without Lightning's gradient scaler: the module has a `LossScale`.

    Lightning's scaler synchronizes in every step, and fused optimizers would get gradients that
    were clipped before they were unscaled.
    """

    def __init__(self, device: str):
        super().__init__("bf16-mixed", device)  # without a scaler
        self.precision = "16-mixed"


class LossScale(nn.Module):
    """The factor of the loss that keeps float16 gradients from underflow.

    The factor is halved after a step with a gradient that is not finite, which the optimizer skips,
    and doubled after `GROWTH_STEPS` finite steps. All of it happens on the device.
    """

    scale: torch.Tensor
    finite_steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(INITIAL_SCALE), persistent=False)
        self.register_buffer("finite_steps", torch.zeros(()), persistent=False)

    def update(self, finite: torch.Tensor) -> torch.Tensor:
        """Adapts the factor after a step, in which the gradient was `finite` or not.

        Returns:
            Whether the run can continue: a gradient that is not finite with a factor of 1 has
            another cause.
        """
        can_continue = finite | (self.scale > 1)
        counted = torch.where(finite, self.finite_steps + 1, 0)
        grows = counted >= GROWTH_STEPS
        shrunk = (self.scale / 2).clamp(min=1)
        self.scale = torch.where(finite, torch.where(grows, self.scale * 2, self.scale), shrunk)
        self.finite_steps = torch.where(grows, 0, counted)
        return can_continue

    def stored(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "finite_steps": self.finite_steps.item()}

    def restore(self, stored: dict[str, float]) -> None:
        self.scale.fill_(stored["scale"])
        self.finite_steps.fill_(stored["finite_steps"])


def check_precision(
    trainer: lightning.Trainer, dtype: torch.dtype, *, trains_base_weights: bool
) -> None:
    """Checks that a model can be trained with the precision of the trainer on its device.

    Args:
        dtype: of the base weights.
        trains_base_weights: whether these are trained, and not an adapter in float32.

    Raises:
        DataError: names what to choose.
    """
    device = trainer.strategy.root_device
    precision: Any = trainer.precision
    name = str(dtype).removeprefix("torch.")
    if precision not in PRECISIONS:
        raise DataError(
            f"trainer.precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got "
            f"{precision}; model.dtype sets the dtype of the weights"
        )
    if dtype not in DTYPES:
        raise DataError(f"model.dtype={name} cannot be trained: use bfloat16, float16 or float32")
    on_gpu = device.type == "cuda"
    without_float16 = "model.dtype=bfloat16 trainer.precision=bf16-mixed"
    if precision == "16-mixed" and not on_gpu:
        raise DataError(
            f"trainer.precision=16-mixed needs a CUDA GPU; on this device use {without_float16}"
        )
    if precision == "16-mixed" and sharding_of(trainer)[0] == "fsdp":
        raise DataError(
            "trainer.precision=16-mixed does not go with strategy=fsdp: use strategy=ddp, or "
            f"{without_float16}"
        )
    if precision == "16-mixed" and dtype == torch.bfloat16:
        raise DataError(
            "trainer.precision=16-mixed computes in float16 and model.dtype=bfloat16 does not go "
            f"with it: use model.dtype=float16, or {without_float16}"
        )
    if dtype == torch.float16 and precision != "16-mixed":
        choice = f"use {without_float16}"
        if on_gpu:
            choice = f"use trainer.precision=16-mixed, or {without_float16}"
        raise DataError(
            f"model.dtype=float16 does not go with trainer.precision={precision}: float16 is "
            f"trained with trainer.precision=16-mixed on a CUDA GPU; here {choice}"
        )
    if dtype == torch.float16 and trains_base_weights:
        raise DataError(
            "model.dtype=float16 is too coarse for weights that are trained: use "
            "model.dtype=float32 with trainer.precision=16-mixed, or an adapter such as lora"
        )
    uses_bfloat16 = precision == "bf16-mixed" or dtype == torch.bfloat16
    if on_gpu and uses_bfloat16 and not _has_bfloat16(device):
        raise DataError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16: use model.dtype=float16 "
            "trainer.precision=16-mixed"
        )


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself: from compute capability 8.0 (Ampere) on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
