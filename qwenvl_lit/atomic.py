"""Files and folders that appear under their name complete, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwenvl_lit.types import DataError


@contextmanager
def atomic_file(path: Path, *, concurrent: bool = False, durable: bool = False) -> Iterator[Path]:
    """Yields a path to write to; when the block ends, the file gets the name `path`.

    Readers see the old or the new content, never half of it. After an error the unfinished file is
    removed and `path` is unchanged. A killed process leaves `NAME.part`, which the next write
    replaces.

    Args:
        concurrent: several processes may write `path` at once. Each gets an unfinished file of its
            own, and the last to finish wins.
        durable: wait until content and name are on the disk, so that both survive a power failure.
    """
    suffix = f".{uuid.uuid4().hex}.part" if concurrent else ".part"
    unfinished = path.with_name(path.name[:200] + suffix)
    try:
        yield unfinished
        if durable:
            _flush(unfinished)
        os.replace(unfinished, path)
        if durable:
            _flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, concurrent: bool = False) -> None:
    """Writes a UTF-8 file with `atomic_file`."""
    with atomic_file(path, concurrent=concurrent) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends, it gets the name `path`.

    A folder that stood there before is replaced. After an error the unfinished folder is removed
    and `path` is unchanged.
    """
    unfinished, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        unfinished.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def disk_errors(path: Path, advice: str = "make room, or choose another folder") -> Iterator[None]:
    """Turns an `OSError` in the block into a `DataError` that names `path` and says what to do.

    Args:
        advice: ends the message.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be written: {reason}; {advice}") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
