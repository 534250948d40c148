"""What is trained: an adapter turns a loaded model into one whose trainable tensors are exactly those of the method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn


class Adapter(Protocol):
    """How a model is fine-tuned."""

    def apply(self, model: nn.Module, parts: Mapping[str, str]) -> nn.Module:
        """The model to train. `parts` names the family's modules: "vision", "language", ... -> path.

        Raises:
            ValueError: a part or a target that does not exist.
        """
        ...

    def merge(self, model: nn.Module) -> nn.Module:
        """The model that `apply` returned, as one of the original class with everything learned folded in."""
        ...


class Full:
    """Train every tensor but those of the frozen parts, and those that the network itself never trains.

    Args:
        freeze: names of parts ("vision", "resampler", "language", "embeddings", "head"). A part inside a frozen one stays trainable
            if `train` names it: `freeze=["vision"], train=["resampler"]` is the recipe of the official full fine-tuning.
    """

    def __init__(self, freeze: Sequence[str] = (), train: Sequence[str] = ()):
        self.freeze = tuple(freeze)
        self.train = tuple(train)

    def apply(self, model: nn.Module, parts: Mapping[str, str]) -> nn.Module:
        unknown = sorted({*self.freeze, *self.train} - set(parts))
        if unknown:
            raise ValueError(f"the model has no part {', '.join(unknown)}; its parts are {', '.join(parts)}")
        learns = {name for name, tensor in model.named_parameters() if tensor.requires_grad}  # not the fixed position tables
        for name in self.freeze:
            model.get_submodule(parts[name]).requires_grad_(False)
        for name in self.train:
            prefix = parts[name]
            for inner, tensor in model.get_submodule(prefix).named_parameters():
                tensor.requires_grad_(f"{prefix}.{inner}" in learns)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model


class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on linear layers, through peft; the base is frozen, the adapters are float32.

    Args:
        rank, alpha, dropout: of every adapter; its output is scaled by `alpha / rank`.
        targets: a regular expression for whole module paths, or "all-linear" for every linear layer but the head.
    """

    def __init__(self, *, rank: int, alpha: int, dropout: float, targets: str):
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets

    def apply(self, model: nn.Module, parts: Mapping[str, str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        if self.targets != "all-linear" and not any(re.fullmatch(self.targets, name) for name, _ in model.named_modules()):
            linear = sorted({re.sub(r"\d+", "N", name) for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise ValueError(f"adapter.targets={self.targets!r} matches no module; linear layers are {', '.join(linear)}")
        settings = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.targets)
        return get_peft_model(model, settings)

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()
