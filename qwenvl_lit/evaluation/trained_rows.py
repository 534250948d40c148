"""Finds the rows of test files on which the run that is tested was trained."""

from __future__ import annotations

import filecmp
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.cli.early_checks import datasets_of, sources
from qwenvl_lit.data.selection import parse_count
from qwenvl_lit.evaluation.sets import EvaluationSet
from qwenvl_lit.runs.run import Run, folders_of
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
    warnings = []
    for file in dict.fromkeys(_test_files(sets)):  # sets may share a file
        for other in trained:
            if relation := _relation(file, other):
                warnings.append(
                    f"{relation}: the score does not show how the model answers new rows"
                )
    return warnings


def _test_files(sets: Iterable[EvaluationSet]) -> Iterator[Path]:
    for evaluation_set in sets:
        yield from _files_of(evaluation_set.config, "test")


def _trained_files(run: Run) -> Iterator[Path]:
    """Yields the training files of a run, and of the runs that it started from."""
    for folder in folders_of(run):
        if not (folder / CONFIG).exists():
            return
        yield from _files_of(OmegaConf.create(read_config(folder / CONFIG)), "train")


def _files_of(config: DictConfig, split: str) -> Iterator[Path]:
    """Yields the existing files of a split, which are named by paths or glob patterns."""
    for dataset in datasets_of(config):
        for source in sources(dataset.get(split)):
            pattern = os.path.expanduser(parse_count(source)[0])
            for folder in (dataset.get("root"), None):
                path = os.path.join(os.path.expanduser(folder), pattern) if folder else pattern
                found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
                if found:
                    yield from map(Path, filter(os.path.isfile, found))
                    break


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
