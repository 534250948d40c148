"""Files and folders that appear under their name complete, or not at all."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwenvl_lit.locks import ProcessLock
from qwenvl_lit.types import DataError

log = logging.getLogger(__name__)


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


def write_to_cache(path: Path, write: Callable[[Path], object]) -> bool:
    """Writes a file of a cache, which can be made again at any time.

    If it cannot be written, because the cache is full or read-only, a warning names the file.

    Args:
        write: called with the path of an unfinished file, see `atomic_file`.

    Returns:
        Whether the file was written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, concurrent=True) as unfinished:
            write(unfinished)
    except OSError as error:
        if error.errno is None:
            raise  # not about a disk: what `write` reads is damaged, for instance
        log.warning(
            "the cache file %s cannot be written: %s; it will be made again each time. Free disk "
            "space there, or choose another cache with paths.cache=FOLDER",
            *(path, error.strerror or error),
        )
        return False
    return True


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends, it gets the name `path`.

    After an error the unfinished folder is removed and `path` is unchanged. Beside `path` stand,
    while the block runs, `.NAME.ID.part`, `.NAME.ID.lock` and at its end `.NAME.ID.old`, with an ID
    that no other process has. Those of killed processes are removed by the next call. If one was
    killed between the two renames of a replacement, the folder that it had moved away comes back.

    Args:
        replace: whether a folder that stands at `path` when the block ends is replaced.

    Raises:
        DataError: `path` exists when the block ends, and `replace` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    unfinished, old, lock = _temporary_names(path, uuid.uuid4().hex)
    process_lock = ProcessLock(lock)
    process_lock.acquire()
    try:
        unfinished.mkdir()
        yield unfinished
        _move(unfinished, path, old if replace else None)
    finally:
        _remove(unfinished)
        if old.exists() and not path.exists():
            old.rename(path)
        _remove(old)
        process_lock.release()


def _temporary_names(path: Path, name: str) -> tuple[Path, Path, Path]:
    stem = path.with_name(f".{path.name[:200]}.{name}")
    return Path(f"{stem}.part"), Path(f"{stem}.old"), Path(f"{stem}.lock")


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes have left of `path`; others of these names are in use."""
    pattern = re.compile(re.escape(f".{path.name[:200]}.") + r"([0-9a-f]{32})\.lock")
    for file in path.parent.iterdir():
        leftover = pattern.fullmatch(file.name)
        if leftover is None:
            continue
        process_lock = ProcessLock(file)
        with suppress(OSError):  # a folder that cannot be cleaned up can still be written to
            if process_lock.acquire():
                unfinished, old, _ = _temporary_names(path, leftover[1])
                if old.exists() and not path.exists():
                    old.rename(path)
                _remove(unfinished)
                _remove(old)
                process_lock.release()


def _move(unfinished: Path, path: Path, old: Path | None) -> None:
    """Renames `unfinished` to `path`; what stands there is renamed to `old`, if that is given."""
    while True:
        if path.exists() or path.is_symlink():
            if old is None:
                raise DataError(
                    f"{path} was made by another process in the meantime and is not replaced; "
                    "choose another folder"
                )
            _remove(old)
            with suppress(FileNotFoundError):
                path.rename(old)
        try:
            unfinished.rename(path)
            return
        except OSError as error:
            # Another process has put its own folder there since.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(file: Path) -> Path:
    """Renames a damaged file to `NAME.broken`, or `NAME.broken_2` and so on; returns the name."""
    number = 1
    name = aside = file.with_name(f"{file.name}.broken")
    while os.path.lexists(aside):
        number += 1
        aside = name.with_name(f"{name.name}_{number}")
    file.rename(aside)
    return aside


@contextmanager
def disk_errors(
    path: Path, advice: str = "free disk space, or choose another folder"
) -> Iterator[None]:
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
