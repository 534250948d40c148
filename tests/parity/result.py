"""What a comparison yields, and how recorded files are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class UnreadableError(ValueError):
    """A recorded file that cannot be compared: broken, incomplete, or without what it needs."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One comparison of a case: how far ours is from the recorded value, and how far it may be."""

    case: str
    of: str  # what is compared: logits, ids, ...
    deviation: float
    allowed: float = 0
    ours: Any = None  # what `deviations.json` states of a case that differs on purpose

    @property
    def passed(self) -> bool:
        return self.deviation <= self.allowed  # not so for NaN


def same(case: str, of: str, ours: Any, golden: Any) -> Result:
    """An exact comparison."""
    return Result(case=case, of=of, deviation=float(ours != golden), ours=ours)


def read(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UnreadableError: there is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnreadableError(f"needs {path.name} beside it") from None
    except ValueError as fault:  # no UTF-8, or no JSON
        raise UnreadableError(f"{path.name} is no JSON: {fault}") from None
    if not isinstance(data, dict):
        raise UnreadableError(f"{path.name} is no JSON object")
    return data


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UnreadableError: it is missing or broken.
    """
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as fault:
        raise UnreadableError(f"{path.name} cannot be read as safetensors: {fault}") from None


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; infinite between different shapes. The reference may keep every n-th entry of the last dimension."""
    ours = ours[..., :: max(ours.shape[-1] // theirs.shape[-1], 1)]
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")


def worst(deviations: Iterable[float]) -> float:
    """The largest; a NaN if there is one, which `max` would pass over."""
    return torch.tensor([*deviations], dtype=torch.float64).max().item()
