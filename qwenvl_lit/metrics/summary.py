"""`metrics.json` of a run folder: reads the validation scores of its best and last checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCORES_FILE = "metrics.json"
VALIDATION = "val/"  # the names of validation scores begin with it


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSummary:
    """The best and the last validation of a training run; empty if there was none."""

    best: dict[str, Any]
    last: dict[str, Any]

    @property
    def scores(self) -> dict[str, float | None]:
        """Validation scores of the best checkpoint, or of the last validation if none was kept."""
        return _validation_scores(self.best) or _validation_scores(self.last)

    @property
    def score_names(self) -> list[str]:
        """Names of all validation scores, of the best and of the last validation."""
        return list(_validation_scores({**self.best, **self.last}))


def read_fit_summary(folder: Path) -> FitSummary:
    """Reads the summary of the run in `folder`; empty until the run has written its scores."""
    file = folder / SCORES_FILE
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    fit = content.get("fit", {})
    return FitSummary(best=fit.get("best") or {}, last=fit.get("last") or {})


def _validation_scores(entry: dict[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in entry.items() if name.startswith(VALIDATION)}
