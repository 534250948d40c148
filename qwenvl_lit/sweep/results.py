"""Stores and reads the result of each job of a sweep."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypedDict

from qwenvl_lit.atomic import write_text
from qwenvl_lit.metrics.summary import read_fit_summary
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError

RESULT = "job.json"
COMPOSED = ".hydra/config.yaml"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A job that has ended."""

    folder: Path
    overrides: tuple[str, ...]
    seconds: float
    error: str | None
    config: str | None  # the text of `COMPOSED` with which the job ran
    scores: dict[str, float | None]  # of the best checkpoint, else of the last validation

    @property
    def values(self) -> dict[str, str]:
        """The values that the command line of the job has set."""
        return override_values(self.overrides)


class _Record(TypedDict):
    """What `save_result` writes."""

    overrides: tuple[str, ...]
    seconds: float
    error: str | None
    config: str | None


def override_values(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the value of each key, without the quotes of free text.

    >>> override_values(["adapter=lora", "adapter.rank=4", "~callbacks.samples"])
    {'adapter': 'lora', 'adapter.rank': '4'}
    >>> override_values(["data.train='a b.jsonl'"])
    {'data.train': 'a b.jsonl'}
    """
    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals:
            quoted = re.fullmatch("'(.*)'", value, re.DOTALL)
            values[key] = quoted[1] if quoted else value
    return values


def save_result(
    folder: Path, overrides: Sequence[str], *, seconds: float, error: str | None
) -> None:
    """Writes how a job ended, and the config it ran with, into its run folder.

    A job without this file counts as unfinished.
    """
    composed = folder / COMPOSED
    record = {
        "overrides": list(overrides),
        "seconds": round(seconds, 1),
        "error": error,
        "config": composed.read_text(encoding="utf-8") if composed.exists() else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps(record, indent=2) + "\n")


def read_result(folder: Path) -> Result | None:
    """Reads the result of the job in `folder`; None if it has not ended.

    A damaged result counts as missing, with a warning. The job is resumed and writes a new result.
    """
    file = folder / RESULT
    if not file.exists():
        return None
    try:
        ended = _read_record(file)
    except DataError as error:
        log.warning("%s. The job counts as unfinished", error)
        return None
    return Result(folder=folder, **ended, scores=read_fit_summary(folder).scores)


def _read_record(file: Path) -> _Record:
    record = read_json_object(file)
    for key in ("error", "config"):
        if not isinstance(record.get(key), str | None):
            raise DataError(f"{file} cannot be read: {key} is {record[key]!r:.40}, expected text")
    try:
        return _Record(
            overrides=tuple(map(str, record["overrides"])),
            seconds=float(record["seconds"]),
            error=record["error"],
            config=record["config"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error!r}") from error


def read_results(folder: Path) -> list[Result]:
    """Reads the jobs of a sweep's folder that have ended, in the order of their numbers."""
    results = []
    for job_folder in folder.glob("*"):
        result = read_result(job_folder)
        if result is not None:
            results.append(result)
    results.sort(key=lambda result: (len(result.folder.name), result.folder.name))
    return results


def varied_keys(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the keys whose values differ between jobs.

    >>> varied_keys([{"adapter": "lora", "rank": "4"}, {"adapter": "lora", "rank": "8"}])
    ['rank']
    """
    varied = []
    for key in dict.fromkeys(chain.from_iterable(jobs)):
        if len({values.get(key) for values in jobs}) > 1:
            varied.append(key)
    return varied
