"""Files from the web: resumed where they broke off, checked, complete or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import logging
import math
import os
import re
import shutil
import string
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from filelock import FileLock

from qwenvl_lit.types import DataError, ImageSource

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 64 * 2**20
OFFLINE = ("QWENVL_LIT_OFFLINE", "HF_HUB_OFFLINE")  # environment variables that forbid downloads

_BLOCK = 1 << 20
_REPORT_SECONDS = 15
_PASSING = {
    408,
    425,
    429,
}  # refusals of a server that may be over in a moment, beside those from 500 on


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a server is waited for. Tries that brought something do not count."""

    tries: int = 5
    pause_seconds: float = 1.0  # before the second try; doubled before each further one
    timeout_seconds: float = 30.0  # without a single byte
    total_seconds: float = math.inf


PATIENT = Patience()


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    download: bool = True,
    patience: Patience = PATIENT,
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
        raise DataError(
            f"{target} does not exist and {why}; get it from {url}{sized(size)} and put it there"
        )
    part = target.with_name(target.name + ".part")
    lock = target.with_name(target.name + ".lock")
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if target.exists():  # another process was faster
                return target
            if size is None and checksum is None:
                part.unlink(missing_ok=True)  # nothing would tell whether the rest belongs to it
            log.info("downloading %s%s to %s", url, sized(size), target)
            _Download(url, part, size=size, patience=patience).run()
            _check_sum(part, checksum, url)
            os.replace(part, target)
            lock.unlink(missing_ok=True)
    return target


def offline(download: bool = True) -> str:
    """Why nothing may be downloaded; empty if it may."""
    if not download:
        return "downloads are off (data.download=false)"
    names = [
        name
        for name in OFFLINE
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
    ]
    return f"downloads are off ({names[0]} is set)" if names else ""


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image on the web, fetched into `folder` when it is first needed.

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
            DataError: it cannot be fetched, is no image, or is larger than `MAX_IMAGE_BYTES`.
        """
        ending = PurePosixPath(urlsplit(self.url).path).suffix.lower()
        ending = ending if re.fullmatch(r"\.[a-z0-9]{1,5}", ending) else ""
        target = self.folder / (hashlib.sha256(self.url.encode()).hexdigest() + ending)
        if target.exists():
            return target
        if why := offline(self.download):
            raise DataError(f"image {self.url} is not in {self.folder} and {why}")
        with disk_faults(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            part = (
                self.folder / f"{target.stem[:16]}.{uuid.uuid4().hex}.part"
            )  # of this call alone: nothing has to wait
            try:
                _Download(self.url, part, limit=MAX_IMAGE_BYTES, patience=self.patience).run()
                _check_image(part, self.url)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
        return target


class BrokeOffError(Exception):
    """A try that failed but may succeed when repeated."""


class WrongPartError(BrokeOffError):
    """What was downloaded before is not the beginning of what is there now."""


class _Download:
    """Brings what a file `part` lacks of an address."""

    def __init__(
        self,
        url: str,
        part: Path,
        *,
        patience: Patience,
        size: int | None = None,
        limit: int | None = None,
    ):
        _check_scheme(url)
        self.url, self.part, self.patience, self.size, self.limit = url, part, patience, size, limit
        self.version: str | None = (
            None  # of the file at `url`, so that no piece of another one is appended
        )
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
                    raise DataError(
                        f"{self.url} cannot be downloaded, {failed} tries in a row failed: {fault}; try again later"
                    ) from None
                pause = self.patience.pause_seconds * 2 ** max(0, failed - 1)
                log.warning(
                    "%s: %s; going on in %.3g s, %s are there",
                    self.url,
                    fault,
                    pause,
                    in_bytes(self.have),
                )
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
            total = self.size if response.length is None else start + response.length
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
            raise DataError(
                f"{self.url} has {total} bytes ({kind}), but {self.size} were published; it is another file"
            )
        if self.limit is not None and total > self.limit:
            raise DataError(
                f"{self.url} has {in_bytes(total)}, the limit is {in_bytes(self.limit)}"
            )

    def _copy(self, response, file, start: int, total: int | None) -> None:
        done, began, reported = start, time.monotonic(), time.monotonic()
        while block := _read(response):
            file.write(block)
            done += len(block)
            now = time.monotonic()
            if self.limit is not None and done > self.limit:
                raise DataError(f"{self.url} is larger than the limit of {in_bytes(self.limit)}")
            if now > self.ends:
                raise DataError(
                    f"{self.url} is too slow: {in_bytes(done)} in {self.patience.total_seconds:.0f} s"
                )
            if now - reported > _REPORT_SECONDS:
                reported = now
                rate = (done - start) / (now - began)
                log.info(
                    "%s%s, %s/s",
                    in_bytes(done),
                    f" of {in_bytes(total)}" if total else "",
                    in_bytes(rate),
                )


@contextmanager
def _opened(
    url: str, headers: Mapping[str, str], timeout: float
) -> Iterator[http.client.HTTPResponse]:
    try:
        plain = quote(
            url, safe=string.punctuation
        )  # spaces and letters beyond ASCII, as browsers write them
        response = urllib.request.urlopen(
            urllib.request.Request(plain, headers=dict(headers)), timeout=timeout
        )
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
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers["Content-Range"] or "")
    if not found:
        raise WrongPartError("it sent some part and did not say which")
    return int(found.group(1))


def _version(response: http.client.HTTPResponse) -> str | None:
    tag = response.headers["ETag"]
    return tag if tag and not tag.startswith("W/") else response.headers["Last-Modified"]


@contextmanager
def disk_faults(target: Path) -> Iterator[None]:
    """Faults of the disk, said as what they stop."""
    try:
        yield
    except OSError as fault:
        raise DataError(
            f"{target} cannot be written: {fault.strerror or fault}; make room, or choose another folder"
        ) from None


def _check_scheme(url: str) -> None:
    try:
        scheme = urlsplit(url).scheme.lower()
    except ValueError as fault:
        raise DataError(f"{url[:200]!r} is not an address: {fault}") from None
    if scheme not in ("http", "https"):
        raise DataError(f"{url[:200]!r} is not an http or https address; nothing else is fetched")


def _check_size(file: Path, size: int | None) -> None:
    if size is not None and file.stat().st_size != size:
        raise DataError(
            f"{file} has {file.stat().st_size} bytes, but {size} were published; remove it, and it is fetched again"
        )


def _check_sum(part: Path, checksum: str | None, url: str) -> None:
    if checksum is None:
        return
    kind, _, expected = checksum.partition(":")
    with part.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        part.unlink()
        raise DataError(
            f"{url} is not the published file: its {kind} is {found}, expected {expected}; what came was removed"
        )


def _check_image(part: Path, url: str) -> None:
    try:
        ImageSource(part).size  # noqa: B018
    except DataError as fault:
        with part.open("rb") as file:
            begins = file.read(40)
        raise DataError(
            f"{str(fault).replace(str(part), url)}; it begins with {begins!r}"
        ) from None


def check_room(folder: Path, needed: int) -> None:
    """
    Raises:
        DataError: the disk of `folder` has fewer bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {in_bytes(free)} free, {in_bytes(needed)} are needed; make room, or choose another folder"
        )


def sized(size: int | None) -> str:
    """A size in brackets, if it is known."""
    return "" if size is None else f" ({in_bytes(size)})"


def in_bytes(count: float) -> str:
    """
    >>> in_bytes(6_645_013_297)
    '6.65 GB'
    """
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.2f} GB"
