"""One pass over all rows before they are used: what each would cost, which are to be left out, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from qwenvl_lit.types import Conversation, DataError, Dropped

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

T = TypeVar("T")
Kind = Literal[
    "error", "dropped", "note", "duplicate"
]  # unusable | left out, as the config asks | not as it was written | also in another set
Look = Callable[[Conversation], T]
Progress = Callable[[int], object]  # called with the number of rows that are done, now and then

CHUNK = 256  # rows that a process takes at a time, at most
SHOWN = 5  # errors that `measure` writes out
FORMAT = 1  # of the cached files


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is to be said about one row."""

    kind: Kind
    index: int  # place among the rows
    id: str  # "" where the row could not be read
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Lengths of all rows, and what is to be said about some."""

    lengths: np.ndarray  # (rows,) int32, tokens; 0 where a row is left out
    supervised: np.ndarray  # (rows,) int32, tokens that are learned
    findings: tuple[Finding, ...]  # dropped rows and notes, by index


def survey(
    rows: Sequence[Conversation], look: Look[T], *, workers: int, progress: Progress | None = None
) -> Iterator[T | Finding]:
    """`look(row)` of every row, in order, or the `Finding` of a row that could not be read or looked at.

    Args:
        look: can be pickled, as can `rows`, where processes are not forked.
        workers: processes; with one or none, and for few rows, the work is done in this one.

    Raises:
        DataError: a process died, for want of memory as a rule.
    """
    size = min(CHUNK, -(-len(rows) // max(1, 4 * workers)))
    starts = range(0, len(rows), max(1, size))
    if workers < 2 or len(rows) < CHUNK:
        chunks: Iterable[list[T | Finding]] = (
            _look_at(rows, look, start, size) for start in starts
        )
    else:
        chunks = _in_processes(rows, look, workers, starts, size)
    done = 0
    for chunk in chunks:
        done += len(chunk)
        if progress:
            progress(done)
        yield from chunk


def measure(
    rows: Sequence[Conversation],
    processor: Processor,
    *,
    workers: int,
    cache: Path | None,
    identity: Any,
    progress: Progress | None = None,
) -> Measured:
    """Tokens of every row as training would encode it; no image is decoded.

    Args:
        cache: folder where the result is kept; None: nowhere.
        identity: plain data that decides what the rows are: their files (see `stamp`) and how they are read. The processor's own settings
            are added here.

    Raises:
        DataError: rows cannot be used; the message has the first of them and says how many there are.
    """
    file = (
        cache / f"lengths_{_key([FORMAT, len(rows), processor.settings, identity])}.npz"
        if cache
        else None
    )
    if file and (known := _load(file, len(rows))):
        return known
    counts = np.zeros((2, len(rows)), dtype=np.int32)
    findings: list[Finding] = []
    for index, result in enumerate(
        survey(rows, _Count(processor), workers=workers, progress=progress)
    ):
        if isinstance(result, Finding):
            findings.append(result)
        else:
            counts[:, index] = result.tokens, result.supervised
            findings += [
                Finding(kind="note", index=index, id=result.id, message=note)
                for note in result.notes
            ]
    if errors := [finding.message for finding in findings if finding.kind == "error"]:
        more = f"\n... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        raise DataError(
            f"{len(errors)} of {len(rows)} rows cannot be used:\n"
            + "\n".join(errors[:SHOWN])
            + more
        )
    measured = Measured(lengths=counts[0], supervised=counts[1], findings=tuple(findings))
    if file:
        _save(file, measured)
    return measured


def stamp(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of the last change of each file, in order: what an `identity` needs to notice that a file is another one now."""
    return [
        (str(file.resolve()), status.st_size, status.st_mtime_ns)
        for file in files
        for status in [file.stat()]
    ]


@dataclass(frozen=True, slots=True)
class _Counted:
    tokens: int
    supervised: int
    id: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Count:
    processor: Processor

    def __call__(self, conversation: Conversation) -> _Counted:
        tokens, supervised = self.processor.length(conversation)
        return _Counted(tokens, supervised, conversation.id, conversation.notes)


def _look_at(
    rows: Sequence[Conversation], look: Look[T], start: int, size: int
) -> list[T | Finding]:
    results: list[T | Finding] = []
    for index in range(start, min(start + size, len(rows))):
        name = ""
        try:
            conversation = rows[index]
            name = conversation.id
            results.append(look(conversation))
        except DataError as fault:
            results.append(
                Finding(
                    kind="dropped" if isinstance(fault, Dropped) else "error",
                    index=index,
                    id=name,
                    message=str(fault),
                )
            )
    return results


_work: tuple[Sequence[Conversation], Look] | None = (
    None  # of a worker process: sent once, not with every chunk
)


def _start_worker(rows: Sequence[Conversation], look: Look) -> None:
    global _work
    _work = rows, look
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the processes are as many as the cores already


def _look_in_worker(start: int, size: int) -> list:
    assert _work is not None  # the pool's initializer ran
    return _look_at(*_work, start, size)


def _in_processes(
    rows: Sequence[Conversation], look: Look[T], workers: int, starts: range, size: int
) -> Iterator[list[T | Finding]]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(), _start_worker, (rows, look))
    try:
        ahead: deque[Future[list[T | Finding]]] = deque()
        for start in starts:
            ahead.append(pool.submit(_look_in_worker, start, size))
            if len(ahead) > 4 * workers:  # no further: results wait in memory
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as fault:
        raise DataError(
            "a process that read rows died, as a rule for want of memory; give it fewer workers"
        ) from fault
    finally:
        pool.shutdown(cancel_futures=True)


def _key(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[
        :32
    ]


def _load(file: Path, rows: int) -> Measured | None:
    """What `_save` wrote; None if there is nothing, or nothing whole: it is computed again then."""
    try:
        with np.load(file, allow_pickle=False) as content:
            lengths, supervised, findings = (
                content[name] for name in ("lengths", "supervised", "findings")
            )
        known = tuple(Finding(**finding) for finding in json.loads(findings.tobytes()))
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError):
        return None
    return (
        Measured(lengths=lengths, supervised=supervised, findings=known)
        if len(lengths) == rows
        else None
    )


def _save(file: Path, measured: Measured) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    findings = np.frombuffer(
        json.dumps([asdict(finding) for finding in measured.findings]).encode(), dtype=np.uint8
    )
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    with unfinished.open("wb") as stream:
        np.savez_compressed(
            stream, lengths=measured.lengths, supervised=measured.supervised, findings=findings
        )
    unfinished.replace(file)  # another process sees all of it or nothing
