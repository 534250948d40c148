"""Files from the web: resumed where they broke off, checked, complete or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import logging
import math
import os
import re
import shutil
import stat
import string
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from filelock import FileLock
from PIL import Image, UnidentifiedImageError

from qwenvl_lit.types import DataError

log = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 64 * 2**20
OFFLINE = ("QWENVL_LIT_OFFLINE", "HF_HUB_OFFLINE")  # environment variables that forbid downloads

_BLOCK = 1 << 20
_REPORT_SECONDS = 15
_PASSING = {408, 425, 429}  # refusals of a server that may be over in a moment, beside those from 500 on


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a server is waited for. Tries that brought something do not count."""

    tries: int = 5
    pause_seconds: float = 1.0  # before the second try; doubled before each further one
    timeout_seconds: float = 30.0  # without a single byte
    total_seconds: float = math.inf


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    download: bool = True,
    patience: Patience = Patience(),
) -> Path:
    """`target`, downloaded from `url` unless it is there.

    Until it is complete and checked it is `<target>.part`; a later call continues that, of whatever process. Only one process downloads,
    others wait for it.

    Args:
        size: in bytes, as published.
        checksum: `md5:...` or `sha256:...`, as published.
        download: false, or one of the variables `OFFLINE` set to 1: only what is there.

    Raises:
        DataError: it may not be downloaded, the server refuses or breaks off too often, what comes is not what was published, or the disk
            is full.
    """
    if target.exists():
        _check_size(target, size)
        return target
    if why := offline(download):
        raise DataError(f"{target} does not exist and {why}; get it from {url}{_sized(size)} and put it there")
    part = target.with_name(target.name + ".part")
    lock = target.with_name(target.name + ".lock")
    with _written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if target.exists():  # another process was faster
                return target
            if size is None and checksum is None:
                part.unlink(missing_ok=True)  # nothing would tell whether the rest belongs to it
            log.info("downloading %s%s to %s", url, _sized(size), target)
            _Download(url, part, size=size, patience=patience).run()
            _check_sum(part, checksum, url)
            os.replace(part, target)
            lock.unlink(missing_ok=True)
    return target


def offline(download: bool = True) -> str:
    """Why nothing may be downloaded; empty if it may."""
    if not download:
        return "downloads are off (data.download=false)"
    names = [name for name in OFFLINE if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")]
    return f"downloads are off ({names[0]} is set)" if names else ""


@dataclass(frozen=True, slots=True)
class RemotePicture:
    """A picture on the web, fetched into `folder` when it is first needed.

    Raises:
        DataError: `url` is not http or https.
    """

    url: str
    folder: Path
    download: bool = True
    patience: Patience = Patience(tries=3, timeout_seconds=20.0, total_seconds=120.0)

    def __post_init__(self):
        _check_scheme(self.url)

    @property
    def name(self) -> str:
        return self.url

    def path(self) -> Path:
        """The file in `folder`; any number of processes may ask at once.

        Raises:
            DataError: it cannot be fetched, is no picture, or is larger than `MAX_PICTURE_BYTES`.
        """
        ending = PurePosixPath(urlsplit(self.url).path).suffix.lower()
        ending = ending if re.fullmatch(r"\.[a-z0-9]{1,5}", ending) else ""
        target = self.folder / (hashlib.sha256(self.url.encode()).hexdigest() + ending)
        if target.exists():
            return target
        if why := offline(self.download):
            raise DataError(f"picture {self.url} is not in {self.folder} and {why}")
        with _written(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=target.stem[:16] + ".", suffix=".part")
            os.close(handle)
            part = Path(name)
            try:
                _Download(self.url, part, limit=MAX_PICTURE_BYTES, patience=self.patience).run()
                _check_picture(part, self.url)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
        return target


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


def provide(archives: Sequence[Archive], root: Path, *, download: bool = True, patience: Patience = Patience()) -> None:
    """See that `root` holds all that `archives` give; what is there is left as it is.

    A file or folder appears when all of it has been unpacked. An archive that was downloaded is removed after that.

    Raises:
        DataError: as `fetch`, and for an archive that is broken or lacks what it should give.
    """
    if not (missing := _missing(archives, root)):
        return
    if (absent := _absent(missing, root)) and (why := offline(download)):
        raise DataError(_what_to_bring(missing, absent, root, why))
    with _written(root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetch.lock"):
            missing = _missing(archives, root)  # another process may have brought them
            absent = _absent(missing, root)
            _check_room(root, size := sum(archive.size for archive in absent))
            if absent:
                log.info("%s needs %s from the web", root, _bytes(size))
            for archive in missing:
                file = fetch(archive.url, root / archive.name, size=archive.size, checksum=archive.checksum, patience=patience)
                for name in archive.gives:
                    if not (root / name).exists():
                        _unpack(file, name, root)
                if archive in absent:
                    file.unlink()


def _missing(archives: Sequence[Archive], root: Path) -> list[Archive]:
    return [archive for archive in archives if not all((root / name).exists() for name in archive.gives)]


def _absent(archives: Sequence[Archive], root: Path) -> list[Archive]:
    return [archive for archive in archives if not (root / archive.name).exists()]


def _what_to_bring(missing: Sequence[Archive], absent: Sequence[Archive], root: Path, why: str) -> str:
    lacks = ", ".join(name for archive in missing for name in archive.gives if not (root / name).exists())
    sources = "".join(f"\n  {archive.url}{_sized(archive.size)}" for archive in absent)
    return f"{root} lacks {lacks}, and {why}. Put these there, unpacked or as they are, or let data.root be the folder with them:{sources}"


def _unpack(file: Path, name: str, root: Path) -> None:
    """Bring the file or folder `name` of a zip into `root`; files that an interrupted call has unpacked are not unpacked again."""
    stage = root / f".{file.name}.part"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename == name or entry.filename.startswith(name + "/")]
            entries = [entry for entry in entries if not entry.is_dir()]
            if not entries:
                raise DataError(f"{file} has no {name}; is it the archive that is meant?")
            _check_room(root, sum(entry.file_size for entry in entries))
            log.info("unpacking %s (%s files, %s) to %s", name, len(entries), _bytes(sum(entry.file_size for entry in entries)), root)
            for entry in entries:
                _unpack_file(archive, entry, stage)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as fault:
        raise DataError(f"{file} is not a sound zip file: {fault}; remove it, and it is fetched again") from None
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(stage / name, root / name)
    if not any(path.is_file() for path in stage.rglob("*")):
        shutil.rmtree(stage)


def _unpack_file(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    path = PurePosixPath(entry.filename)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in entry.filename
        or ":" in entry.filename
        or stat.S_ISLNK(entry.external_attr >> 16)
    ):
        raise DataError(f"{archive.filename} holds {entry.filename!r}, which would not stay in its folder; nothing of it is used further")
    target = folder / path
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with archive.open(entry) as source, part.open("wb") as copy:
        shutil.copyfileobj(source, copy, _BLOCK)  # zipfile compares the CRC at the end
    os.replace(part, target)


class BrokeOffError(Exception):
    """A try that failed but may succeed when repeated."""


class WrongPartError(BrokeOffError):
    """What was downloaded before is not the beginning of what is there now."""


class _Download:
    """Brings what a file `part` lacks of an address."""

    def __init__(self, url: str, part: Path, *, patience: Patience, size: int | None = None, limit: int | None = None):
        _check_scheme(url)
        self.url, self.part, self.patience, self.size, self.limit = url, part, patience, size, limit
        self.version: str | None = None  # of the file at `url`, so that no piece of another one is appended
        self.ends = time.monotonic() + patience.total_seconds

    def run(self) -> None:
        failed = 0
        while True:
            before = self.have
            try:
                self._go_on()
                return
            except BrokeOffError as fault:
                if isinstance(fault, WrongPartError):
                    self.part.unlink(missing_ok=True)
                failed = 0 if self.have > before else failed + 1
                if failed >= self.patience.tries:
                    raise DataError(f"{self.url} cannot be downloaded, {failed} tries in a row failed: {fault}; try again later") from None
                pause = self.patience.pause_seconds * 2 ** max(0, failed - 1)
                log.warning("%s: %s; going on in %.3g s, %s are there", self.url, fault, pause, _bytes(self.have))
                time.sleep(pause)

    @property
    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _go_on(self) -> None:
        have = self.have
        if self.size is not None and have == self.size:
            return
        headers = {"User-Agent": "qwenvl_lit", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.version:
                headers["If-Range"] = self.version
        with _opened(self.url, headers, self.patience.timeout_seconds) as response:
            start = _start(response)
            if start not in (0, have):
                raise WrongPartError(f"asked to go on from byte {have}, it went on from {start}")
            length = response.headers["Content-Length"]
            total = self.size if length is None else start + int(length)
            self._check_total(total, response.headers["Content-Type"])
            self.version = _version(response)
            with self.part.open("ab" if start else "wb") as file:
                self._copy(response, file, start, total)
        if total is not None and self.have < total:
            raise BrokeOffError(f"it broke off after {self.have} of {total} bytes")
        self._check_total(self.have, "no length told")

    def _check_total(self, total: int | None, kind: str) -> None:
        if total is None:
            return
        if self.size is not None and total != self.size:
            self.part.unlink(missing_ok=True)
            raise DataError(f"{self.url} has {total} bytes ({kind}), but {self.size} were published; it is another file")
        if self.limit is not None and total > self.limit:
            raise DataError(f"{self.url} has {_bytes(total)}, the limit is {_bytes(self.limit)}")

    def _copy(self, response, file, start: int, total: int | None) -> None:
        done, began, reported = start, time.monotonic(), time.monotonic()
        while block := _read(response):
            file.write(block)
            done += len(block)
            now = time.monotonic()
            if self.limit is not None and done > self.limit:
                raise DataError(f"{self.url} is larger than the limit of {_bytes(self.limit)}")
            if now > self.ends:
                raise DataError(f"{self.url} is too slow: {_bytes(done)} in {self.patience.total_seconds:.0f} s")
            if now - reported > _REPORT_SECONDS:
                reported = now
                rate = (done - start) / (now - began)
                log.info("%s%s, %s/s", _bytes(done), f" of {_bytes(total)}" if total else "", _bytes(rate))


@contextmanager
def _opened(url: str, headers: Mapping[str, str], timeout: float) -> Iterator[http.client.HTTPResponse]:
    try:
        plain = quote(url, safe=string.punctuation)  # spaces and letters beyond ASCII, as browsers write them
        response = urllib.request.urlopen(urllib.request.Request(plain, headers=dict(headers)), timeout=timeout)
    except urllib.error.HTTPError as fault:
        said = f"the server says {fault.code} {fault.reason}"
        if fault.code == 416:  # there is no such rest
            raise WrongPartError(said) from None
        if fault.code < 500 and fault.code not in _PASSING:
            raise DataError(f"{url} cannot be downloaded: {said}; check the address") from None
        raise BrokeOffError(said) from None
    except (ValueError, http.client.InvalidURL) as fault:
        raise DataError(f"{url} is not an address: {fault}") from None
    except (OSError, http.client.HTTPException) as fault:
        raise BrokeOffError(f"no answer: {fault}") from None
    with response:
        _check_scheme(response.url)
        yield response


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_BLOCK)
    except http.client.IncompleteRead as fault:
        return fault.partial
    except (OSError, http.client.HTTPException) as fault:
        raise BrokeOffError(f"it broke off: {fault}") from None


def _start(response: http.client.HTTPResponse) -> int:
    """The byte of the file that the answer begins with; a server may ignore that only a rest was asked for."""
    found = re.match(r"bytes (\d+)-", response.headers["Content-Range"] or "") if response.status == 206 else None
    return int(found.group(1)) if found else 0


def _version(response: http.client.HTTPResponse) -> str | None:
    tag = response.headers["ETag"]
    return tag if tag and not tag.startswith("W/") else response.headers["Last-Modified"]


@contextmanager
def _written(target: Path) -> Iterator[None]:
    """Faults of the disk, said as what they stop."""
    try:
        yield
    except OSError as fault:
        raise DataError(f"{target} cannot be written: {fault.strerror or fault}; make room, or choose another folder") from None


def _check_scheme(url: str) -> None:
    try:
        scheme = urlsplit(url).scheme.lower()
    except ValueError as fault:
        raise DataError(f"{url[:200]!r} is not an address: {fault}") from None
    if scheme not in ("http", "https"):
        raise DataError(f"{url[:200]!r} is not an http or https address; nothing else is fetched")


def _check_size(file: Path, size: int | None) -> None:
    if size is not None and file.stat().st_size != size:
        raise DataError(f"{file} has {file.stat().st_size} bytes, but {size} were published; remove it, and it is fetched again")


def _check_sum(part: Path, checksum: str | None, url: str) -> None:
    if checksum is None:
        return
    kind, _, expected = checksum.partition(":")
    with part.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        part.unlink()
        raise DataError(f"{url} is not the published file: its {kind} is {found}, expected {expected}; what came was removed")


def _check_picture(part: Path, url: str) -> None:
    try:
        with Image.open(part) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as fault:
        with part.open("rb") as file:
            begins = file.read(40)
        raise DataError(f"{url} is not a picture ({type(fault).__name__}); it begins with {begins!r}") from None


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{folder} has {_bytes(free)} free, {_bytes(needed)} are needed; make room, or choose another folder")


def _sized(size: int | None) -> str:
    return "" if size is None else f" ({_bytes(size)})"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.2f} GB"
