"""The result of a comparison, and readers of recorded files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class UnreadableError(ValueError):
    """A recorded file cannot be compared: it is broken, incomplete, or needs a missing file."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One comparison of a case: the deviation from the recorded value, and its limit."""

    case: str
    of: str
    """What is compared: logits, ids, ..."""
    deviation: float
    allowed: float = 0
    ours: Any = None
    """Our value; `deviations.json` has it for a case that differs on purpose."""
    reason: str | None = None
    """Why the values differ on purpose, if a rule recognizes the case; see `reasons`."""

    def __post_init__(self):
        if not isinstance(self.case, str):
            raise UnreadableError(f"a case is named {self.case!r:.100}, expected text")

    @property
    def passed(self) -> bool:
        return self.deviation <= self.allowed  # False for NaN


def same(
    case: str, of: str, ours: Any, golden: Any, explain: Callable[..., str | None] | None = None
) -> Result:
    """Compares exactly.

    Args:
        explain: called with both values if they differ; returns why they do so on purpose, or None.
    """
    reason = explain(ours, golden) if explain is not None and ours != golden else None
    return Result(case=case, of=of, deviation=float(ours != golden), ours=ours, reason=reason)


def read(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UnreadableError: the file is missing, or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnreadableError(f"needs {path.name} beside it") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UnreadableError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise UnreadableError(f"{path.name} is no JSON object")
    return data


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        UnreadableError: the file is missing or broken.
    """
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UnreadableError(f"{path.name} cannot be read as safetensors: {error}") from None


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the largest absolute difference; infinite between different shapes.

    The recorded tensor may have only every n-th entry of the last dimension.
    """
    ours = ours[..., :: max(ours.shape[-1] // theirs.shape[-1], 1)]
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")


def worst(deviations: Iterable[float]) -> float:
    """Returns the largest deviation, or NaN if there is one, which `max` may ignore."""
    return torch.tensor([*deviations], dtype=torch.float64).max().item()
