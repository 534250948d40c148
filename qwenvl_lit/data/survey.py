"""Reads all rows before they are used: their lengths, and the rows to leave out or to report."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from qwenvl_lit.atomic import write_to_cache
from qwenvl_lit.data.image_notes import measured_notes
from qwenvl_lit.data.orphans import end_with_parent
from qwenvl_lit.terminal import counted, printable
from qwenvl_lit.types import (
    BadImage,
    Conversation,
    DataError,
    Dropped,
    Length,
    location_of,
)

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

T = TypeVar("T")
# unusable | left out as the config asks | repaired or suspicious | an unusual image | also in
# another set
Kind = Literal["error", "dropped", "note", "image", "duplicate"]
Look = Callable[[Conversation], T]
Progress = Callable[[int], object]  # called now and then with the number of rows done so far
ReportProgress = Callable[[str, int, int], object]  # name of the work, how much is done, how much

CHUNK = 256  # most rows that a process takes at a time
COUNTS = ("lengths", "supervised", "image_tokens", "images")  # the arrays of `Measured`
DROP_ADVICE = "or leave out such rows: data.on_bad_image=drop"  # ends the message of a bad image
SHOWN = 5  # errors that the message of `measure_lengths` quotes
FORMAT = 7  # version of the cached files


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something wrong or unusual about one row."""

    kind: Kind
    index: int  # position among the rows
    id: str  # "" if the row could not be read that far
    message: str  # begins with place and id of the row
    where: str = ""  # the place of the row, as in `Conversation.where`; "" if it is not known
    bad_image: bool = False  # an image is missing or cannot be decoded

    @property
    def problem(self) -> str:
        """The message without place and id of the row."""
        return self.message.removeprefix(printable(location_of(self.where, self.id)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The lengths of all rows, and the findings about some of them."""

    lengths: np.ndarray  # (rows,) int32, tokens; 0 for a row that is left out
    supervised: np.ndarray  # (rows,) int32, supervised tokens
    image_tokens: np.ndarray  # (rows,) int32, tokens that vision features replace
    images: np.ndarray  # (rows,) int32, images
    findings: tuple[Finding, ...]  # dropped rows and notes, ordered by index


def survey(
    rows: Sequence[Conversation],
    look: Look[T],
    *,
    workers: int,
    drop_bad: bool = False,
    progress: Progress | None = None,
) -> Iterator[T | Finding]:
    """Yields `look(row)` for every row in order, or a `Finding` for a row that raised `DataError`.

    Args:
        look: pickled, as is `rows`, on platforms that do not fork.
        workers: number of processes. With fewer than two, or with few rows, this process does the
            work.
        drop_bad: the finding of a row with a missing or broken image is "dropped", not "error".

    Raises:
        DataError: a process died, usually for lack of memory.
    """
    size = min(CHUNK, -(-len(rows) // max(1, 4 * workers)))
    starts = range(0, len(rows), max(1, size))
    chunks: Iterable[list[T | Finding]]
    if workers < 2 or len(rows) < CHUNK:
        chunks = (_look_at(rows, look, drop_bad, start, size) for start in starts)
    else:
        chunks = _in_processes((rows, look, drop_bad), workers, starts, size)
    done = 0
    for chunk in chunks:
        done += len(chunk)
        if progress:
            progress(done)
        yield from chunk


def measure_lengths(
    rows: Sequence[Conversation],
    processor: Processor,
    *,
    workers: int,
    cache: Path | None,
    identity: Any,
    drop_bad: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """Counts the tokens of every row as training encodes it, without decoding an image.

    Args:
        cache: folder in which the result is kept; None: nowhere.
        identity: plain data that determines the rows: their files (see `stamp`) and how they are
            read. The settings of the processor are added here.
        drop_bad: leave out rows with missing images.

    Raises:
        DataError: some rows cannot be used; the message quotes the first of them and counts all.
    """
    file = None
    if cache:
        key = _key([FORMAT, len(rows), processor.settings, drop_bad, identity])
        file = cache / f"lengths_{key}.npz"
        if known := _load(file, len(rows)):
            return known
    counts = np.zeros((4, len(rows)), dtype=np.int32)
    findings: list[Finding] = []
    known_notes: set[str] = set()
    count = _CountTokens(processor)
    results = survey(rows, count, workers=workers, drop_bad=drop_bad, progress=progress)
    for index, result in enumerate(results):
        if isinstance(result, Finding):
            findings.append(result)
            continue
        counts[:, index] = *result.length, result.images
        for note in result.notes:
            findings.append(result.finding("note", index, note))
        for note in result.image_notes:
            if note not in known_notes:  # several rows may share an image
                known_notes.add(note)
                findings.append(result.finding("image", index, note))
    _raise_errors(findings, len(rows), drop_bad)
    measured = Measured(**dict(zip(COUNTS, counts, strict=True)), findings=tuple(findings))
    if file:
        _save(file, measured)
    return measured


def stamp(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Returns path, size and modification time of each file; part of an `identity`."""
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    return stamps


def _raise_errors(findings: Iterable[Finding], rows: int, drop_bad: bool) -> None:
    errors = []
    for finding in findings:
        if finding.kind == "error":
            advice = f"; {DROP_ADVICE}" if finding.bad_image and not drop_bad else ""
            errors.append(f"{finding.message}{advice}")
    if not errors:
        return
    lines = [f"{len(errors)} of {counted(rows, 'row')} cannot be used:", *errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"... and {len(errors) - SHOWN} more: qwenvl_lit.check lists all of them")
    raise DataError(*lines)


@dataclass(frozen=True, slots=True)
class _RowTokens:
    length: Length
    images: int
    id: str
    where: str
    notes: tuple[str, ...]
    image_notes: tuple[str, ...]

    def finding(self, kind: Kind, index: int, note: str) -> Finding:
        message = location_of(self.where, self.id) + note
        return Finding(kind=kind, index=index, id=self.id, message=message, where=self.where)


@dataclass(frozen=True, slots=True)
class _CountTokens:
    processor: Processor

    def __call__(self, conversation: Conversation) -> _RowTokens:
        image_notes = chain.from_iterable(map(measured_notes, conversation.images))
        return _RowTokens(
            self.processor.length(conversation),
            len(conversation.images),
            conversation.id,
            conversation.where,
            conversation.notes,
            tuple(image_notes),
        )


def _look_at(
    rows: Sequence[Conversation], look: Look[T], drop_bad: bool, start: int, size: int
) -> list[T | Finding]:
    results: list[T | Finding] = []
    for index in range(start, min(start + size, len(rows))):
        conversation = None
        try:
            conversation = rows[index]
            results.append(look(conversation))
        except DataError as error:
            if conversation is not None:
                error = conversation.located(error)
            results.append(_finding_of(error, index, drop_bad))
    return results


def _finding_of(error: DataError, index: int, drop_bad: bool) -> Finding:
    bad_image = isinstance(error, BadImage)
    is_dropped = isinstance(error, Dropped) or (bad_image and drop_bad)
    return Finding(
        kind="dropped" if is_dropped else "error",
        index=index,
        id=error.row_id,
        message=str(error),
        where=error.where,
        bad_image=bad_image,
    )


# The rows of a worker process and what to do with each. They are sent once, not with every chunk.
_Work = tuple[Sequence[Conversation], Look[T], bool]  # `rows`, `look` and `drop_bad` of `survey`
_work: _Work | None = None


def _start_worker(work: _Work) -> None:
    global _work
    end_with_parent()
    _work = work
    # There are as many processes as cores, so each one needs a single thread. A process in which
    # nothing has imported torch has no threads to limit, and importing it would take seconds.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _look_in_worker(start: int, size: int) -> list:
    assert _work is not None  # the initializer of the pool has run
    return _look_at(*_work, start, size)


def _in_processes(
    work: _Work[T], workers: int, starts: range, size: int
) -> Iterator[list[T | Finding]]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(), _start_worker, (work,))
    try:
        ahead: deque[Future[list[T | Finding]]] = deque()
        for start in starts:
            ahead.append(pool.submit(_look_in_worker, start, size))
            if len(ahead) > 4 * workers:  # a limit, since results wait in memory
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that read rows died, usually for lack of memory; use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _key(identity: Any) -> str:
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _load(file: Path, rows: int) -> Measured | None:
    """Returns what `_save` wrote, or None if the file is missing, unreadable or damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            counts = {name: content[name] for name in COUNTS}
            findings = json.loads(content["findings"].tobytes())
        known = tuple(Finding(**finding) for finding in findings)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError):
        return None
    if any(len(values) != rows for values in counts.values()):
        return None
    return Measured(**counts, findings=known)


def _save(file: Path, measured: Measured) -> None:
    findings = json.dumps([asdict(finding) for finding in measured.findings])
    arrays = {name: getattr(measured, name) for name in COUNTS}
    arrays["findings"] = np.frombuffer(findings.encode(), dtype=np.uint8)

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    write_to_cache(file, write)
