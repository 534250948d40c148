"""Finds the rows of test files on which the run that is tested was trained."""

from __future__ import annotations

import filecmp
import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwenvl_lit.data.selection import parse_count
from qwenvl_lit.evaluation.sets import EvaluationSet
from qwenvl_lit.runs.run import Run
from qwenvl_lit.runs.stored_config import read_config

CONFIG = "config.yaml"  # of a run folder, with resolved paths
ROW_PER_LINE = ".jsonl"
MAX_BYTES = 10**9  # of a training file whose lines are read


def find_trained_rows(sets: Iterable[EvaluationSet], run: Run) -> list[str]:
    """Returns a warning for each test file that has rows of a training file of `run`.

    A file is compared as a whole and, if it has a row per line, by line. Training files that have
    been moved since are not found.
    """
    trained = dict.fromkeys(_trained_files(run))
    warnings: dict[str, None] = {}  # sets may share a file
    for file in _test_files(sets):
        for other in trained:
            if relation := _relation(file, other):
                warnings[f"{relation}: the score does not show how the model answers new rows"] = (
                    None
                )
    return list(warnings)


def _test_files(sets: Iterable[EvaluationSet]) -> Iterator[Path]:
    for evaluation_set in sets:
        for dataset in _datasets(OmegaConf.to_container(evaluation_set.config.data, resolve=True)):
            test = dataset.get("test") or ()
            sources = list(test.values()) if isinstance(test, Mapping) else test
            yield from _files(sources, dataset)


def _datasets(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for dataset in (data, *(data.get("datasets") or {}).values()):
        if isinstance(dataset, Mapping):
            yield dataset


def _trained_files(run: Run) -> Iterator[Path]:
    """Yields the training files of a run, and of the runs that it started from."""
    folder, init = run.folder, run.config.get("init")
    while folder is not None and (folder / CONFIG).exists():
        data = read_config(folder / CONFIG).get("data") or {}
        for dataset in _datasets(data):
            yield from _files(dataset.get("train") or (), dataset)
        if not init:
            return
        folder, init = Path(init["checkpoint"]).parent.parent, init.get("init")


def _files(sources: str | Sequence[Any], dataset: Mapping[str, Any]) -> Iterator[Path]:
    """Yields the existing files that `sources` names: a path or a glob pattern, or several."""
    if not isinstance(sources, str):
        for source in sources:
            yield from _files(source, dataset)
        return
    pattern = os.path.expanduser(parse_count(sources)[0])
    for folder in (dataset.get("root"), None):
        path = os.path.join(os.path.expanduser(folder), pattern) if folder else pattern
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if found:
            yield from map(Path, filter(os.path.isfile, found))
            return


def _relation(file: Path, trained: Path) -> str | None:
    """Says which rows of `file` are in the training file; None if there are none."""
    if file.samefile(trained):
        return f"{file} is a training file of the run"
    if filecmp.cmp(file, trained, shallow=False):
        return f"{file} has the content of {trained}, a training file of the run"
    has_lines = file.suffix == trained.suffix == ROW_PER_LINE
    if not has_lines or trained.stat().st_size > MAX_BYTES:
        return None
    rows = set(_lines(file))
    found = rows.intersection(_lines(trained))
    if not found:
        return None
    share = f"{len(found):,} of the {len(rows):,} rows of {file}"
    return f"{share} are in {trained}, a training file of the run"


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield line.strip()
