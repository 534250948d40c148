"""Published zip files: fetched, and what is needed of them unpacked."""

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

from qwenvl_lit.data.download.files import (
    PATIENT,
    Patience,
    check_room,
    disk_faults,
    fetch,
    in_bytes,
    offline,
    sized,
)
from qwenvl_lit.types import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A published zip file and what of it is needed."""

    url: str
    size: int  # bytes
    gives: tuple[str, ...]  # files and folders, named as in the archive
    checksum: str | None = None  # as `fetch` takes it

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


def provide(
    archives: Sequence[Archive], root: Path, *, download: bool = True, patience: Patience = PATIENT
) -> None:
    """See that `root` holds all that `archives` give; what is there is left as it is.

    A file or folder appears when all of it has been unpacked. An archive that was downloaded is removed after that.

    Raises:
        DataError: as `fetch`, and for an archive that is broken or lacks what it should give.
    """
    if not (missing := _missing(archives, root)):
        return
    if (absent := _absent(missing, root)) and (why := offline(download)):
        raise DataError(_what_to_bring(missing, absent, root, why))
    with disk_faults(root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetch.lock"):
            missing = _missing(archives, root)  # another process may have brought them
            absent = _absent(missing, root)
            check_room(root, size := sum(archive.size for archive in absent))
            if absent:
                log.info("%s needs %s from the web", root, in_bytes(size))
            for archive in missing:
                file = fetch(
                    archive.url,
                    root / archive.name,
                    size=archive.size,
                    checksum=archive.checksum,
                    patience=patience,
                )
                for name in archive.gives:
                    if not (root / name).exists():
                        _unpack(file, name, root)
                if archive in absent:
                    file.unlink()


def _missing(archives: Sequence[Archive], root: Path) -> list[Archive]:
    return [
        archive for archive in archives if not all((root / name).exists() for name in archive.gives)
    ]


def _absent(archives: Sequence[Archive], root: Path) -> list[Archive]:
    return [archive for archive in archives if not (root / archive.name).exists()]


def _what_to_bring(
    missing: Sequence[Archive], absent: Sequence[Archive], root: Path, why: str
) -> str:
    lacks = ", ".join(
        name for archive in missing for name in archive.gives if not (root / name).exists()
    )
    sources = "".join(f"\n  {archive.url}{sized(archive.size)}" for archive in absent)
    return f"{root} lacks {lacks}, and {why}. Put these there, unpacked or as they are, or let data.root be the folder with them:{sources}"


def _unpack(file: Path, name: str, root: Path) -> None:
    """Bring the file or folder `name` of a zip into `root`; files that an interrupted call has unpacked are not unpacked again."""
    stage = root / f".{file.name}.part"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [
                entry
                for entry in archive.infolist()
                if entry.filename == name or entry.filename.startswith(name + "/")
            ]
            entries = [entry for entry in entries if not entry.is_dir()]
            if not entries:
                raise DataError(f"{file} has no {name}; is it the archive that is meant?")
            check_room(root, sum(entry.file_size for entry in entries))
            log.info(
                "unpacking %s (%s files, %s) to %s",
                name,
                len(entries),
                in_bytes(sum(entry.file_size for entry in entries)),
                root,
            )
            for entry in entries:
                _unpack_file(archive, entry, stage)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as fault:
        raise DataError(
            f"{file} is not a sound zip file: {fault}; remove it, and it is fetched again"
        ) from None
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(stage / name, root / name)
    if not any(path.is_file() for path in stage.rglob("*")):
        shutil.rmtree(stage)


def _unpack_file(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    path = PurePosixPath(entry.filename)
    leaves = (
        path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename
    )
    if leaves or stat.S_ISLNK(entry.external_attr >> 16):
        raise DataError(
            f"{archive.filename} holds {entry.filename!r}, which would not stay in its folder; nothing of it is used further"
        )
    target = folder / path
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with archive.open(entry) as source, part.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)  # zipfile compares the CRC at the end
    os.replace(part, target)
