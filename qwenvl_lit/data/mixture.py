"""One dataset of a run: its training, held-out and test rows, and how many an epoch takes."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.selection import Concat, Rows, Subset, flatten, parse_count, take
from qwenvl_lit.data.split import NothingToTrainOnError, hold_out
from qwenvl_lit.data.survey import Finding, Measured, measure_lengths, stamp
from qwenvl_lit.images import DeepImage, Exif
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

Files = str | Sequence[str]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedDataset:
    """The rows that one dataset gives to training."""

    stages: tuple[Rows, ...]
    """Training rows, in the order of the dataset's files."""
    validation: Rows = ()
    sizes: tuple[np.ndarray, ...] = ()
    """(3, rows): the `Length` of the rows of each stage, then of the validation rows; empty before
    `measure`."""
    findings: tuple[Finding, ...] = ()
    images: int = 0  # of all training rows
    left_out: int = 0  # measured rows
    distinct: int = 0  # rows that were measured
    bad: int = 0  # measured rows that have a missing image

    @property
    def lengths(self) -> tuple[np.ndarray, ...]:
        """Tokens of the rows of each stage, then of the validation rows."""
        return tuple(tokens for tokens, _, _ in self.sizes)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Describes one dataset: its files, how their rows are read, and how many an epoch takes.

    Args:
        read: opens files, `read(files, read_options)`.
        root, path_map, markup, on_bad_box, prompt, cache, download, allow_private_hosts,
            user_agent, exif, on_deep_image: see `ReadOptions`.
        train: a path or a glob pattern, or several. A path may end in `#N`, which takes N rows:
            as many whole passes as fit, then a random rest.
        validation: files, given as for `train`; or the number (int) or share (float below 1) of
            the rows of `train` to hold out. Rows are held out before `#N` repeats them, so no row
            is in both splits; N includes the held-out rows.
        test: a path or a glob pattern, or several by name, each scored separately.
        prepare: writes or downloads files, `prepare(root, download)`; called once per machine
            before anything is read.
        rows: how many of the training rows an epoch takes (int), or how often it takes each
            (float: 2.0 is twice; 0.5 is half of the rows, the same half in every epoch). None: all
            rows, once.
        seed: seed of the random choices: held-out rows, and the rest beyond whole passes.
        split_file: where held-out rows are remembered, see `hold_out`.

    Raises:
        DataError: `rows` is neither a number of rows nor a factor.
    """

    read: Callable[[str, ReadOptions], Rows]
    root: str | Path | None = None
    path_map: Mapping[str, str] | None = None
    markup: Literal["all", "questions", "none"] = "all"
    on_bad_box: Literal["error", "keep", "repair", "drop"] = "error"
    prompt: str | None = None
    cache: str | Path | None = None
    download: bool = True
    allow_private_hosts: bool = False
    user_agent: str | None = None
    exif: Exif = "ignore"
    on_deep_image: DeepImage = "keep"
    train: Files | None = None
    validation: Files | int | float | None = None
    test: str | Mapping[str, Files] | None = None
    prepare: Callable[[Path | None, bool], object] | None = None
    rows: int | float | None = None
    seed: int = 42
    split_file: str | Path | None = None

    def __post_init__(self):
        _check_validation(self.validation)
        if self.rows is None:
            return
        is_number = isinstance(self.rows, int | float) and 0 < self.rows < math.inf
        # `rows=1` could mean one row or every row once.
        if not is_number or (isinstance(self.rows, int) and self.rows < 2):
            raise DataError(
                f"rows={self.rows}: give a number of rows such as 2000, or how often to take each, "
                "with a decimal point: 0.5, 1.0"
            )

    @cached_property
    def read_options(self) -> ReadOptions:
        return ReadOptions(
            root=_path(self.root),
            path_map=_expanded(self.path_map or {}),
            markup=self.markup,
            on_bad_box=self.on_bad_box,
            prompt=self.prompt,
            cache=_path(self.cache),
            download=self.download,
            allow_private_hosts=self.allow_private_hosts,
            user_agent=self.user_agent,
            exif=self.exif,
            on_deep_image=self.on_deep_image,
            seed=self.seed,
        )

    @property
    def holds_out_rows(self) -> bool:
        """True if the validation rows are drawn from the training rows."""
        return isinstance(self.validation, int | float) and bool(self.validation)

    def prepare_files(self) -> None:
        if self.prepare is not None:
            self.prepare(self.read_options.root, self.download)

    def open_training(self) -> OpenedDataset:
        """Opens the training rows and the validation rows.

        Raises:
            DataError: files cannot be read, no row is left to train on, or the held-out rows are
                not those of `split_file`.
        """
        files, counts, distinct = [], [], []
        for source in _as_list(self.train):
            name, count = parse_count(source)
            rows = self.read(name, self.read_options)
            if count is None:
                count = len(rows)
            files.append(rows)
            counts.append(count)
            # A count above the number of rows repeats them below, after rows were held out.
            distinct.append(take(rows, count, self.seed) if count < len(rows) else rows)
        rest, validation = distinct, self._open_validation_files()
        if self.holds_out_rows and distinct:
            split_file = _path(self.split_file or None)
            rest, validation = hold_out(distinct, self.validation, seed=self.seed, file=split_file)
        stages = []
        for rows, count, before, after in zip(files, counts, distinct, rest, strict=True):
            if count > len(rows):
                held_out = len(before) - len(after)
                after = take(after, count - held_out, self.seed)
            stages.append(after)
        return OpenedDataset(stages=tuple(self._rows_per_epoch(stages)), validation=validation)

    def open_for_inspection(self) -> OpenedDataset:
        """Like `open_training`. If all rows would be held out, they are training rows instead."""
        try:
            return self.open_training()
        except NothingToTrainOnError as error:
            log.warning("training would stop: %s. All rows are checked", error)
            return replace(self, validation=None).open_training()

    def open_validation(self) -> Rows:
        """Opens the validation rows: held-out ones, or those of files of their own."""
        if self.holds_out_rows:
            return self.open_training().validation
        return self._open_validation_files()

    def open_tests(self) -> dict[str, Rows]:
        """Opens the test sets by name; a set without a name is called `test`."""
        if isinstance(self.test, str):
            return {"test": self._open(self.test)}
        return {name: self._open(files) for name, files in (self.test or {}).items()}

    def measure(
        self, opened: OpenedDataset, processor: Processor, *, workers: int, drop_bad: bool = False
    ) -> OpenedDataset:
        """Returns `opened` with the lengths of its rows and without the rows to leave out.

        Every row is read once, unless the lengths are in the cache.

        Args:
            drop_bad: leave out rows whose images are missing.

        Raises:
            DataError: some rows cannot be used.
        """
        parts = [*opened.stages, opened.validation]
        sources, positions = flatten(Concat(parts))
        distinct, index = np.unique(positions, return_inverse=True)
        rows: Rows = Subset(Concat(sources), distinct)
        measured = self._lengths(rows, sources, distinct, processor, workers, drop_bad)
        ends = list(accumulate(map(len, parts)))
        kept, sizes = [], []
        training = index[: len(index) - len(opened.validation)]
        all_sizes = np.stack((measured.lengths, measured.supervised, measured.image_tokens))
        all_sizes = all_sizes[:, index]
        for part, size in zip(parts, np.split(all_sizes, ends[:-1], axis=1), strict=True):
            usable = np.flatnonzero(size[0])  # rows that are left out have no tokens
            sizes.append(size[:, usable])
            if len(usable) < len(part):
                part = Subset(part, usable)
            kept.append(part)
        return OpenedDataset(
            stages=tuple(kept[:-1]),
            validation=kept[-1],
            sizes=tuple(sizes),
            findings=measured.findings,
            images=int(measured.images[training].sum()),
            left_out=int((measured.lengths == 0).sum()),
            distinct=len(rows),
            bad=sum(finding.bad_image for finding in measured.findings),
        )

    def _rows_per_epoch(self, stages: list[Rows]) -> list[Rows]:
        if self.rows is None:
            return stages
        every_row = Concat(stages)
        count = self.rows
        if isinstance(count, float):
            count = round(count * len(every_row))
        return [take(every_row, count, self.seed)]

    def _open_validation_files(self) -> Rows:
        if self.holds_out_rows or not self.validation:
            return ()
        return self._open(self.validation)

    def _open(self, files: Files) -> Rows:
        parts = [self.read(name, self.read_options) for name in _as_list(files)]
        if len(parts) == 1:
            return parts[0]
        return Concat(parts)

    def _lengths(
        self,
        rows: Rows,
        sources: Sequence[Rows],
        distinct: np.ndarray,
        processor: Processor,
        workers: int,
        drop_bad: bool,
    ) -> Measured:
        """Measures `rows`, which are the rows of the joined `sources` at the indices `distinct`."""
        files = _files_of(sources)
        stamps = None if files is None else stamp(files)
        identity = [
            stamps,
            [getattr(source, "split", None) for source in sources if len(source)],
            hashlib.sha256(distinct.tobytes()).hexdigest(),
            asdict(self.read_options),
            self._reader_arguments(),
        ]
        cache = None
        if self.read_options.cache and stamps:
            cache = self.read_options.cache / "lengths"
        options = {"workers": workers, "cache": cache, "identity": identity, "drop_bad": drop_bad}
        return measure_lengths(rows, processor, **options)

    def _reader_arguments(self) -> tuple[str, ...]:
        if isinstance(self.read, partial):
            return repr(self.read.args), repr(self.read.keywords)
        return ()


def _check_validation(validation: Files | int | float | None) -> None:
    if validation != "" and isinstance(validation, str | Sequence | None):
        return
    share = isinstance(validation, float) and 0 <= validation < 1
    count = isinstance(validation, int) and not isinstance(validation, bool) and validation >= 0
    if not share and not count:
        raise ValueError(
            f"data.validation must be a file, a whole number of rows or a share below 1, "
            f"got {validation!r:.100}"
        )


def _files_of(sources: Sequence[Rows]) -> list[Path] | None:
    """Returns the files that rows are read from; None if a source does not name its files.

    A source names its `file`, or its `files` if it reads several; `part` tells apart sources that
    read the same file.
    """
    files: list[Path] = []
    for source in sources:
        if not len(source):
            continue
        if not hasattr(source, "file"):
            return None
        files += getattr(source, "files", (source.file,))
    return files


def _as_list(files: Files | None) -> list[str]:
    if isinstance(files, str):
        return [files]
    return list(files or ())


def _expanded(path_map: Mapping[str, str]) -> dict[str, str]:
    return {prefix: os.path.expanduser(path) for prefix, path in path_map.items()}


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser()
