"""Finds the rows of test files on which the run that is tested was trained."""

from __future__ import annotations

import filecmp
import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.cli.early_checks import datasets_of, sources
from qwenvl_lit.data.download.hub import hub_files
from qwenvl_lit.data.readers.columns import json_value
from qwenvl_lit.data.readers.parquet import is_parquet
from qwenvl_lit.data.readers.row_groups import reading
from qwenvl_lit.data.readers.sources import HUB
from qwenvl_lit.data.selection import parse_count
from qwenvl_lit.evaluation.sets import EvaluationSet
from qwenvl_lit.runs.run import Run, folders_of
from qwenvl_lit.runs.stored_config import read_config
from qwenvl_lit.types import DataError

CONFIG = "config.yaml"  # of a run folder, with resolved paths
ROW_PER_LINE = ".jsonl"
MAX_BYTES = 10**9  # of a training file whose rows are read
log = logging.getLogger(__name__)


def find_trained_rows(sets: Iterable[EvaluationSet], run: Run) -> list[str]:
    """Returns a warning for each test file that has rows of a training file of `run`.

    A file is compared as a whole. Lines of jsonl files are compared with each other, and so are
    rows of parquet files with the bytes of their images. Training files that have been moved since,
    or deleted from the hub's cache, are not found.
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
    """Yields the existing files of a split, named by paths, glob patterns or hub addresses."""
    for dataset in datasets_of(config):
        for source in sources(dataset.get(split)):
            pattern = os.path.expanduser(parse_count(source)[0])
            if pattern.startswith(HUB):
                yield from _cached_files(pattern)
                continue
            for folder in (dataset.get("root"), None):
                path = os.path.join(os.path.expanduser(folder), pattern) if folder else pattern
                found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
                if found:
                    yield from map(Path, filter(os.path.isfile, found))
                    break


def _cached_files(address: str) -> list[Path]:
    """Returns the files of a dataset of the hub that are in the hub's cache."""
    try:
        return hub_files(address, download=False)
    except DataError as error:
        log.debug("%s", error)
        return []


def _relation(file: Path, trained: Path) -> str | None:
    """Says which rows of `file` are in the training file; None if there are none."""
    if file.samefile(trained):
        return f"{file} is a training file of the run"
    if filecmp.cmp(file, trained, shallow=False):
        return f"{file} has the content of {trained}, a training file of the run"
    if trained.stat().st_size > MAX_BYTES:
        return None
    if file.suffix == trained.suffix == ROW_PER_LINE:
        rows, trained_rows = set(_lines(file)), _lines(trained)
    elif is_parquet(file) and is_parquet(trained):
        rows, trained_rows = set(_parquet_rows(file)), _parquet_rows(trained)
    else:
        return None
    found = rows.intersection(trained_rows)
    if not found:
        return None
    share = f"{len(found):,} of the {len(rows):,} rows of {file}"
    return f"{share} are in {trained}, a training file of the run"


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield line.strip()


def _parquet_rows(file: Path) -> Iterator[bytes]:
    """Yields a checksum of the values of each row, which is the same in any order of columns."""
    import pyarrow.parquet as pq

    with reading(str(file)):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                text = json.dumps(json_value(row), sort_keys=True, default=_as_text)
                yield sha256(text.encode()).digest()


def _as_text(value: Any) -> str:
    """Returns text for a value that JSON lacks: bytes of an image, a date or a decimal number."""
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    return str(value)
