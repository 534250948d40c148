"""Datasets, one or several: which of their rows are learned from, held out and tested on, and how many an epoch takes of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.split import Concat, Rows, Subset, counted, hold_out, places, take
from qwenvl_lit.data.survey import Finding, measure, stamp
from qwenvl_lit.types import BadImage, Conversation, DataError, Dropped

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

Files = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class OpenedDataset:
    """What one dataset gives to training."""

    stages: tuple[Rows, ...]  # rows to learn from, in the order of its files
    validation: Rows = ()
    lengths: tuple[
        np.ndarray, ...
    ] = ()  # tokens of the rows of each stage, and last those of `validation`; nothing before `measured`
    findings: tuple[Finding, ...] = ()
    distinct: int = 0  # rows that were measured
    bad: int = 0  # of these, how many have an image that cannot be found


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset: its files, how their rows are read, and how many of them an epoch takes.

    Args:
        read: opens files, `read(files, read_options)`.
        root, path_map, on_bad_box, prompt, cache, download: see `ReadOptions`.
        train: a path or a glob, or several. `#N` behind one: N rows of it, as many whole passes as fit in and a random rest.
        validation: the same; or how many rows (int) or which share of them (float below 1) are held out from `train`. What `#N` repeats is
            repeated after that, so that no row is on both sides; the N rows count those that are held out.
        test: a path or a glob, or several by name, each scored apart.
        prepare: called once a machine before anything is read, `prepare(root, download)`: writes or fetches files.
        rows: how many rows (int) an epoch takes of what `train` gives, or how often it takes each (float: 2.0 is twice; 0.5 is half of the
            rows, the same ones in every epoch). None: what `train` gives.
        seed: of what is drawn: held-out rows, and the rest that is no whole pass.
        split_file: where held-out rows are remembered (see `hold_out`).
    """

    read: Callable[[str, ReadOptions], Rows]
    root: str | Path | None = None
    path_map: Mapping[str, str] | None = None
    on_bad_box: Literal["error", "keep", "repair", "drop"] = "error"
    prompt: str | None = None
    cache: str | Path | None = None
    download: bool = True
    train: Files | None = None
    validation: Files | int | float | None = None
    test: str | Mapping[str, Files] | None = None
    prepare: Callable[[Path | None, bool], object] | None = None
    rows: int | float | None = None
    seed: int = 42
    split_file: str | Path | None = None

    def __post_init__(self):
        if (self.rows is not None and self.rows <= 0) or (
            isinstance(self.rows, int) and self.rows < 2
        ):
            raise DataError(
                f"rows={self.rows}: give a number of rows such as 2000, or how often to take each, with a point: 0.5, 1.0"
            )

    @cached_property
    def read_options(self) -> ReadOptions:
        return ReadOptions(
            root=None if self.root is None else Path(self.root),
            path_map=dict(self.path_map or {}),
            on_bad_box=self.on_bad_box,
            prompt=self.prompt,
            cache=None if self.cache is None else Path(self.cache),
            download=self.download,
            seed=self.seed,
        )

    def prepare_files(self) -> None:
        if self.prepare is not None:
            self.prepare(self.read_options.root, self.download)

    def open_training(self) -> OpenedDataset:
        """Rows to learn from and rows held out.

        Raises:
            DataError: files cannot be read, nothing is left to learn from, or held-out rows are others now.
        """
        named = [counted(files) for files in _several(self.train)]
        opened = [self.read(files, self.read_options) for files, _ in named]
        counts = [
            len(rows) if count is None else count
            for rows, (_, count) in zip(opened, named, strict=True)
        ]
        distinct = [
            rows if count >= len(rows) else take(rows, count, self.seed)
            for rows, count in zip(opened, counts, strict=True)
        ]
        stages, validation = distinct, self.open_validation_files()
        if self.draws_validation and distinct:
            stages, validation = hold_out(
                distinct,
                self.validation,
                seed=self.seed,
                file=self.split_file and Path(self.split_file),
            )
        held = [len(rows) - len(rest) for rows, rest in zip(distinct, stages, strict=True)]
        stages = [
            take(rest, count - out, self.seed) if count > len(rows) else rest
            for rows, rest, count, out in zip(opened, stages, counts, held, strict=True)
        ]
        if self.rows is not None:
            every = Concat(stages)
            stages = [
                take(
                    every,
                    self.rows if isinstance(self.rows, int) else round(self.rows * len(every)),
                    self.seed,
                )
            ]
        return OpenedDataset(stages=tuple(stages), validation=validation)

    @property
    def draws_validation(self) -> bool:
        return isinstance(self.validation, int | float) and bool(self.validation)

    def open_validation_files(self) -> Rows:
        return () if self.draws_validation or not self.validation else self._opened(self.validation)

    def open_validation(self) -> Rows:
        """The validation rows of the run: of their own files, or held out."""
        return (
            self.open_training().validation
            if self.draws_validation
            else self.open_validation_files()
        )

    def open_tests(self) -> dict[str, Rows]:
        """Test sets by name; one without a name is called `test`."""
        sets = {"test": self.test} if isinstance(self.test, str) else dict(self.test or {})
        return {name: self._opened(files) for name, files in sets.items()}

    def _opened(self, files: Files) -> Rows:
        parts = [self.read(one, self.read_options) for one in _several(files)]
        return parts[0] if len(parts) == 1 else Concat(parts)

    def measured(
        self, opened: OpenedDataset, processor: Processor, *, workers: int, drop_bad: bool = False
    ) -> OpenedDataset:
        """`opened` without the rows that are to be left out, and with the lengths of the others; every row is read once, or the lengths are
        in the cache.

        Args:
            drop_bad: rows whose images are missing are left out.

        Raises:
            DataError: rows cannot be used.
        """
        parts = [*opened.stages, opened.validation]
        bottoms, place = places(Concat(parts))
        distinct, which = np.unique(place, return_inverse=True)
        # what decides the rows: their `file`, or `files` where there are several, and which `part` of them it is
        named = [rows for rows in bottoms if len(rows)]
        known = all(hasattr(rows, "file") for rows in named)
        stamps = (
            stamp([file for rows in named for file in getattr(rows, "files", (rows.file,))])
            if known
            else None
        )
        options = (
            (repr(self.read.args), repr(self.read.keywords))
            if isinstance(self.read, partial)
            else ()
        )
        rows: Rows = Subset(Concat(bottoms), distinct)
        found = measure(
            Forgiving(rows) if drop_bad else rows,
            processor,
            workers=workers,
            cache=self.read_options.cache / "lengths"
            if self.read_options.cache and stamps
            else None,
            identity=[
                stamps,
                [getattr(rows, "part", None) for rows in named],
                hashlib.sha256(distinct.tobytes()).hexdigest(),
                asdict(self.read_options),
                options,
                drop_bad,
            ],
        )
        ends = list(accumulate(map(len, parts)))
        lengths = np.split(found.lengths[which], ends[:-1])
        used = [np.flatnonzero(some) for some in lengths]
        kept = [
            rows if len(some) == len(rows) else Subset(rows, some)
            for rows, some in zip(parts, used, strict=True)
        ]
        return OpenedDataset(
            stages=tuple(kept[:-1]),
            validation=kept[-1],
            lengths=tuple(some[where] for some, where in zip(lengths, used, strict=True)),
            findings=found.findings,
            distinct=len(rows),
            bad=sum(
                finding.kind == "dropped" and _lacks_a_image(rows, finding.index)
                for finding in found.findings
            ),
        )


@dataclass(frozen=True, slots=True)
class Forgiving(Sequence[Conversation]):
    """Rows of which those with a missing image are to be left out."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Conversation:
        try:
            return self.rows[place]
        except BadImage as fault:
            raise Dropped(str(fault)) from fault


def _lacks_a_image(rows: Rows, place: int) -> bool:
    try:
        rows[place]
    except DataError as fault:
        return isinstance(fault, BadImage)
    return False


def _several(files: Files | None) -> list[str]:
    return [files] if isinstance(files, str) else list(files or ())
