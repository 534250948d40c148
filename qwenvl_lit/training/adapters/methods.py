"""What is trained: an adapter turns a loaded model into one whose trainable tensors are exactly those of the method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn


class Adapter(Protocol):
    """How a model is fine-tuned."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the base is held, as settings of transformers' `BitsAndBytesConfig`; None: in the precision of the model."""
        ...

    def apply(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        """The model to train. `components` names the family's modules: "vision", "language", ... -> path.

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
        freeze: names of parts ("vision", "resampler", "language", "embeddings", "head"), or "all". A part inside a frozen one stays
            trainable if `train` names it: `freeze=["vision"], train=["resampler"]` is the recipe of the official full fine-tuning.
    """

    quantization = None

    def __init__(self, freeze: Sequence[str] = (), train: Sequence[str] = ()):
        self.freeze = tuple(freeze)
        self.train = tuple(train)

    def apply(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        components = {**components, "all": ""}
        unknown = sorted({*self.freeze, *self.train} - set(components))
        if unknown:
            raise ValueError(
                f"the model has no part {', '.join(unknown)}; its parts are {', '.join(components)}"
            )
        learns = {
            name for name, tensor in model.named_parameters() if tensor.requires_grad
        }  # not the fixed position tables
        for name in self.freeze:
            model.get_submodule(components[name]).requires_grad_(False)
        for name in self.train:
            prefix = components[name]
            for inner, tensor in model.get_submodule(prefix).named_parameters(prefix):
                tensor.requires_grad_(inner in learns)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model


class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on linear layers, through peft; the base is frozen, the adapters are float32.

    Args:
        rank, alpha, dropout: of every adapter; its output is scaled by `alpha / rank`.
        targets: a regular expression for whole module paths, a list of their ends, or "all-linear" for every linear layer but the head.
        options: further settings of peft's `LoraConfig`, as `use_dora` or `use_rslora`.
        quantization: settings of transformers' `BitsAndBytesConfig` for the base; None: it is held as it is loaded.
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        options: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
    ):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"adapter.rank is a whole number, 1 or more, got {rank!r}")
        for name, value in (("alpha", alpha), ("dropout", dropout)):
            if not isinstance(value, int | float) or value < 0:
                raise ValueError(f"adapter.{name} is a number, 0 or more, got {value!r}")
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets if isinstance(targets, str) else list(targets)
        try:
            re.compile(self.targets if isinstance(self.targets, str) else "")
        except re.error as fault:
            raise ValueError(
                f"adapter.targets={targets!r} is no regular expression: {fault}"
            ) from None
        self.options = dict(options or {})
        self.quantization = dict(quantization) if quantization else None

    def apply(self, model: nn.Module, components: Mapping[str, str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        matched = {name: module for name, module in model.named_modules() if self._is_target(name)}
        if isinstance(self.targets, list) and (
            idle := [end for end in self.targets if not any(_ends(name, end) for name in matched)]
        ):
            raise ValueError(f"adapter.targets names {', '.join(idle)}, which no module ends in")
        if not matched and self.targets != "all-linear":
            linear = sorted(
                {
                    re.sub(r"\d+", "N", name)
                    for name, module in model.named_modules()
                    if isinstance(module, nn.Linear)
                }
            )
            raise ValueError(
                f"adapter.targets={self.targets!r} matches no module; linear layers are {', '.join(linear)}"
            )
        if other := [
            name
            for name, module in matched.items()
            if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
        ]:
            raise ValueError(
                f"adapter.targets={self.targets!r} matches {other[0]}, which is no linear layer"
            )
        if unknown := sorted(set(self.options) - set(LoraConfig.__dataclass_fields__)):
            raise ValueError(
                f"adapter.options has {', '.join(unknown)}, which peft's LoraConfig does not know"
            )
        sizes = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
        }
        return get_peft_model(model, LoraConfig(**sizes, **self.options))

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()

    def _is_target(self, name: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(_ends(name, end) for end in self.targets)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
