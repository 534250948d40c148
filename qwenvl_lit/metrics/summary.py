"""Reads the validation scores of a run's best and last checkpoint from its `metrics.json`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_lit.atomic import set_aside
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError

SCORES_FILE = "metrics.json"
VALIDATION = "val/"  # prefix of the names of validation scores

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSummary:
    """The best and the last validation of a training run. Both are empty without validation."""

    best: dict[str, Any]
    last: dict[str, Any]

    @property
    def scores(self) -> dict[str, float | None]:
        """Scores of the best validation, or of the last one if no best one is recorded."""
        return _validation_scores(self.best) or _validation_scores(self.last)

    @property
    def score_names(self) -> list[str]:
        """The names of all scores of the best and the last validation."""
        return list(_validation_scores({**self.best, **self.last}))


def read_fit_summary(folder: Path) -> FitSummary:
    """Reads the summary of the run in `folder`.

    The summary is empty if the run has not written any scores yet. If the file is damaged, a
    warning is logged and the summary is empty.
    """
    try:
        fit = _object(read_scores(folder).get("fit"))
    except DataError as error:
        log.warning("%s. The run counts as one without scores", error)
        fit = {}
    return FitSummary(best=_object(fit.get("best")), last=_object(fit.get("last")))


def read_scores(folder: Path) -> dict[str, Any]:
    """Reads the complete scores file of the run in `folder`. Returns {} if it does not exist.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / SCORES_FILE
    return read_json_object(file) if file.exists() else {}


def scores_to_update(folder: Path) -> dict[str, Any]:
    """Reads the scores file before some of its entries are replaced.

    A damaged file is renamed with a warning, and {} is returned.
    """
    try:
        return read_scores(folder)
    except DataError as error:
        aside = set_aside(folder / SCORES_FILE)
        log.warning("%s. It is now %s, and its earlier scores are only there", error, aside.name)
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _validation_scores(entry: dict[str, Any]) -> dict[str, float | None]:
    scores = {}
    for name, value in entry.items():
        if name.startswith(VALIDATION) and isinstance(value, int | float | None):
            scores[name] = value
    return scores
