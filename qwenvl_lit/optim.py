"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


class AdamW:
    """AdamW with warm-up; matrices decay, vectors (biases, norms) do not.

    Args:
        lr: peak rate a step.
        warmup: steps (1 or more), or their share of all steps (below 1).
        schedule: what follows the warm-up; "cosine" and "linear" end at zero.
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        warmup: float = 0.05,
        schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
    ):
        self.lr = lr
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.schedule = schedule

    def build(self, model: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Optimizer over the trainable tensors of `model`, and its schedule, to be stepped `total_steps` times.

        Raises:
            ValueError: nothing is trainable.
        """
        trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
        if not trainable:
            raise ValueError("nothing is trainable: check the adapter")
        groups = [
            {"params": [tensor for tensor in trainable if tensor.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [tensor for tensor in trainable if tensor.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        warmup_steps = int(self.warmup if self.warmup >= 1 else self.warmup * total_steps)
        return optimizer, get_scheduler(self.schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
