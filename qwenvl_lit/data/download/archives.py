"""Published zip files: downloads them and unpacks the members that are needed."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from filelock import FileLock

from qwenvl_lit.atomic import atomic_file, disk_errors
from qwenvl_lit.data.download.files import (
    DEFAULT_RETRIES,
    RetryPolicy,
    check_free_space,
    fetch,
    format_bytes,
    format_size,
    why_offline,
)
from qwenvl_lit.data.expansion import check_expansion
from qwenvl_lit.types import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A published zip file, and the members of it that are needed."""

    url: str
    size: int  # bytes
    members: tuple[str, ...]  # files and folders, named as in the archive
    checksum: str | None = None  # see `fetch`

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name

    def missing_from(self, root: Path) -> list[str]:
        """Returns the members that `root` lacks."""
        return [name for name in self.members if not (root / name).exists()]


def ensure_unpacked(
    archives: Sequence[Archive],
    root: Path,
    *,
    download: bool = True,
    retries: RetryPolicy = DEFAULT_RETRIES,
) -> None:
    """Downloads and unpacks the members of `archives` that `root` lacks; others are not touched.

    A file or folder appears under its name when all of it has been unpacked. A downloaded archive
    is then removed; one that was there already is kept.

    Raises:
        DataError: as `fetch`; or an archive is broken or lacks one of its members.
    """
    missing = _missing(archives, root)
    if not missing:
        return
    absent = _absent(missing, root)
    reason = why_offline(download)
    if absent and reason:
        raise DataError(*_instructions(missing, absent, root, reason))
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetch.lock"):
            missing = _missing(archives, root)  # another process may have unpacked them
            absent = _absent(missing, root)
            size = sum(archive.size for archive in absent)
            check_free_space(root, size)
            if absent:
                log.info("%s needs %s from the web", root, format_bytes(size))
            for archive in missing:
                file = fetch(
                    archive.url,
                    root / archive.name,
                    size=archive.size,
                    checksum=archive.checksum,
                    retries=retries,
                )
                for name in archive.missing_from(root):
                    _unpack(file, name, root)
                if archive in absent:
                    file.unlink()


def _missing(archives: Sequence[Archive], root: Path) -> list[Archive]:
    return [archive for archive in archives if archive.missing_from(root)]


def _absent(archives: Sequence[Archive], root: Path) -> list[Archive]:
    """Returns the archives whose zip file is not in `root`."""
    return [archive for archive in archives if not (root / archive.name).exists()]


def _instructions(
    missing: Sequence[Archive], absent: Sequence[Archive], root: Path, reason: str
) -> list[str]:
    """Returns the lines of an error message that lists what to download by hand."""
    names = [name for archive in missing for name in archive.missing_from(root)]
    sources = [f"  {archive.url}{format_size(archive.size)}" for archive in absent]
    return [
        f"{root} lacks {', '.join(names)}, and {reason}. Download these files into that folder "
        f"(unpacking is optional), or set data.root to a folder that has them:",
        *sources,
    ]


def _unpack(file: Path, name: str, root: Path) -> None:
    """Unpacks the file or folder `name` of a zip file into `root`.

    Members are unpacked into a stage folder, which an interrupted call leaves behind: the next call
    skips the files that are in it. (`atomic_folder` would start again with an empty folder.)
    """
    stage = root / f".{file.name}.part"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = _entries_of(archive, name)
            if not entries:
                raise DataError(f"{file} has no {name}; is it the right archive?")
            size = sum(entry.file_size for entry in entries)
            check_expansion(file, sum(entry.compress_size for entry in entries), size)
            check_free_space(root, size)
            files = len(entries)
            log.info("unpacking %s (%s files, %s) to %s", name, files, format_bytes(size), root)
            for entry in entries:
                _unpack_file(archive, entry, stage)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{file} is not a valid zip file: {error}; remove it, and it is downloaded again"
        ) from None
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(stage / name, root / name)
    if not any(path.is_file() for path in stage.rglob("*")):
        shutil.rmtree(stage)


def _entries_of(archive: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    """Returns the entries of the file `name`, or of all files in the folder `name`."""
    entries = []
    for entry in archive.infolist():
        within = entry.filename == name or entry.filename.startswith(name + "/")
        if within and not entry.is_dir():
            entries.append(entry)
    return entries


def _unpack_file(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    path = PurePosixPath(entry.filename)
    escapes = path.is_absolute() or ".." in path.parts
    escapes = escapes or "\\" in entry.filename or ":" in entry.filename
    if escapes or stat.S_ISLNK(entry.external_attr >> 16):
        raise DataError(
            f"{archive.filename} contains {entry.filename!r}, which could write outside its folder;"
            f" nothing more of it is unpacked"
        )
    target = folder / path
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        archive.open(entry) as source,
        atomic_file(target) as unfinished,
        unfinished.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy, 1 << 20)  # zipfile checks the CRC at the end
