"""Downloads files: resumes interrupted transfers, checks the result, and leaves no half files.

This is not huggingface_hub, pooch or fsspec because of the resumption over several calls, with
checks that both halves belong to the same file, and because of the errors, which say what to do.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock

from qwenvl_lit.atomic import atomic_file, disk_errors
from qwenvl_lit.data.download.connections import (
    Hosts,
    Limits,
    PartMismatchError,
    RetryableError,
    check_scheme,
    opened,
)
from qwenvl_lit.data.download.encodings import decoded, encoding_of
from qwenvl_lit.terminal import printable
from qwenvl_lit.types import DataError, ImageSource

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 64 * 2**20
OFFLINE = ("QWENVL_LIT_OFFLINE", "HF_HUB_OFFLINE")  # environment variables that forbid downloads
USER_AGENT = "qwenvl_lit"
CACHE_ADVICE = "free disk space there, or choose another cache with paths.cache=FOLDER"

_BLOCK = 1 << 20  # bytes
_REPORT_SECONDS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often and how long a download is tried. Tries that received data do not count."""

    tries: int = 5
    pause_seconds: float = 1.0  # before the second try; doubled before each further one
    timeout_seconds: float = 30.0  # without a single byte; also until all headers have arrived
    total_seconds: float = 24 * 3600.0  # of all tries together


DEFAULT_RETRIES = RetryPolicy()


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    download: bool = True,
    retries: RetryPolicy = DEFAULT_RETRIES,
) -> Path:
    """Downloads `url` to `target`, unless it exists; returns `target`.

    The unfinished file is `<target>.part`. It stays after an error, and a later call of any process
    resumes it. (`atomic_file` would remove it.) Of several processes one downloads and the others
    wait for it.

    Args:
        size: the published size in bytes.
        checksum: the published checksum, `md5:...` or `sha256:...`.
        download: if false, or if one of the variables `OFFLINE` is set to 1, only an existing file
            is returned.

    Raises:
        DataError: downloads are off, the server refuses, too many tries failed, the file is not the
            published one, or the disk is full.
    """
    if target.exists():
        _check_size(target, size)
        return target
    if reason := why_offline(download):
        raise DataError(
            f"{target} does not exist and {reason}; get it from {url}{format_size(size)} "
            f"and put it there"
        )
    part = target.with_name(target.name + ".part")
    lock = target.with_name(target.name + ".lock")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if target.exists():  # another process was faster
                return target
            if size is None and checksum is None:
                # Nothing could tell whether an earlier part and the rest are of the same file.
                part.unlink(missing_ok=True)
            log.info("downloading %s%s to %s", url, format_size(size), target)
            # The host is the package's choice; where it redirects to is checked.
            _Download(url, part, size=size, retries=retries, allow_private=True).run()
            _check_sum(part, checksum, url)
            os.replace(part, target)
            lock.unlink(missing_ok=True)
    return target


def why_offline(download: bool = True) -> str:
    """Returns the reason why nothing may be downloaded; empty if downloads are allowed."""
    if not download:
        return "downloads are off (data.download=false)"
    for name in OFFLINE:
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
            return f"downloads are off ({name} is set)"
    return ""


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image on the web, downloaded into `folder` when it is first needed.

    Args:
        allow_private_hosts: the host of `url` may be this machine or one of its network.
        user_agent: the header User-Agent; None: `USER_AGENT`.

    Raises:
        DataError: `url` is not http or https.
    """

    url: str
    folder: Path
    download: bool = True
    allow_private_hosts: bool = False
    user_agent: str | None = None
    retries: RetryPolicy = RetryPolicy(tries=3, timeout_seconds=20.0, total_seconds=120.0)

    def __post_init__(self):
        check_scheme(self.url)

    @property
    def name(self) -> str:
        return self.url

    def path(self) -> Path:
        """Returns the file in `folder`. Several processes may call this at once.

        Raises:
            DataError: the file cannot be downloaded, is not an image, or is larger than
                `MAX_IMAGE_BYTES`.
        """
        suffix = PurePosixPath(urlsplit(self.url).path).suffix.lower()
        if not re.fullmatch(r"\.[a-z0-9]{1,5}", suffix):
            suffix = ""
        target = self.folder / (hashlib.sha256(self.url.encode()).hexdigest() + suffix)
        if target.exists():
            return target
        if reason := why_offline(self.download):
            raise DataError(f"image {self.url} is not in {self.folder} and {reason}")
        with disk_errors(target, CACHE_ADVICE):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(target, concurrent=True) as unfinished:
                _Download(
                    self.url,
                    unfinished,
                    limit=MAX_IMAGE_BYTES,
                    retries=self.retries,
                    allow_private=self.allow_private_hosts,
                    user_agent=self.user_agent or USER_AGENT,
                ).run()
                _check_image(unfinished, self.url)
        return target


class _Download:
    """Downloads what the file `part` lacks of `url`.

    Args:
        size: the published size in bytes, which the file must have.
        limit: the largest allowed size in bytes.
        allow_private: see `Hosts`.
        user_agent: the header User-Agent.
    """

    def __init__(
        self,
        url: str,
        part: Path,
        *,
        retries: RetryPolicy,
        size: int | None = None,
        limit: int | None = None,
        allow_private: bool,
        user_agent: str = USER_AGENT,
    ):
        check_scheme(url)
        self.url, self.part, self.retries, self.size, self.limit = url, part, retries, size, limit
        self.allow_private = allow_private
        self.user_agent = user_agent
        # Version of the file at `url`: parts of different versions must not be joined.
        self.version: str | None = None
        self.deadline = time.monotonic() + retries.total_seconds

    def run(self) -> None:
        failed = 0
        while True:
            before = self.received
            try:
                self._resume()
                return
            except RetryableError as error:
                if isinstance(error, PartMismatchError):
                    self.part.unlink(missing_ok=True)
                failed = 0 if self.received > before else failed + 1
                if failed >= self.retries.tries:
                    raise DataError(
                        f"{self.url} cannot be downloaded, {failed} tries in a row failed: "
                        f"{error}; try again later"
                    ) from None
                pause = self.retries.pause_seconds * 2 ** max(0, failed - 1)
                if time.monotonic() + pause > self.deadline:
                    raise self._too_slow(self.received, str(error)) from None
                received = format_bytes(self.received)
                log.warning(
                    f"{printable(self.url)}: {printable(str(error))}; trying again in "
                    f"{pause:.3g} s, with {received} received so far"
                )
                time.sleep(pause)

    @property
    def received(self) -> int:
        """Bytes on disk."""
        return self.part.stat().st_size if self.part.exists() else 0

    def _resume(self) -> None:
        received = self.received
        if self.size is not None and received == self.size:
            return
        headers = {"User-Agent": self.user_agent, "Accept-Encoding": "identity"}
        if received:
            headers["Range"] = f"bytes={received}-"
            if self.version:
                headers["If-Range"] = self.version
        limits = Limits(idle_seconds=self.retries.timeout_seconds, deadline=self.deadline)
        hosts = Hosts(url=self.url, allow_private=self.allow_private)
        with opened(self.url, headers, limits=limits, hosts=hosts) as response:
            encoding = encoding_of(response.headers["Content-Encoding"], self.url)
            if encoding:
                self._decode(response, encoding)
                return
            start = _start(response)
            if start not in (0, received):
                raise PartMismatchError(
                    f"the server was asked to resume at byte {received}, but sent from {start} on"
                )
            total = self.size
            if response.length is not None:
                total = start + response.length
            self._check_total(total, response.headers["Content-Type"])
            self.version = _version(response)
            with self.part.open("ab" if start else "wb") as file:
                self._copy(_blocks(response), file, start, total)
        if total is not None and self.received < total:
            raise RetryableError(f"the transfer ended after {self.received} of {total} bytes")
        self._check_total(self.received, "the server gave no length")

    def _decode(self, response: http.client.HTTPResponse, encoding: str) -> None:
        """Writes a body that the server has compressed. Such a transfer is not resumed."""
        if _start(response):
            raise PartMismatchError(f"the server sent a part in {encoding} encoding")
        try:
            with self.part.open("wb") as file:
                self._copy(decoded(_blocks(response), encoding), file, 0, self.size)
        except RetryableError as error:
            raise PartMismatchError(str(error)) from None
        self._check_total(self.received, f"decoded from {encoding}")

    def _check_total(self, total: int | None, source: str) -> None:
        if total is None:
            return
        if self.size is not None and total != self.size:
            self.part.unlink(missing_ok=True)
            raise DataError(
                f"{self.url} has {total} bytes ({source}), but {self.size} were published; "
                f"it is another file"
            )
        if self.limit is not None and total > self.limit:
            raise DataError(
                f"{self.url} has {format_bytes(total)}, the limit is {format_bytes(self.limit)}"
            )

    def _copy(self, blocks: Iterator[bytes], file: BinaryIO, start: int, total: int | None) -> None:
        done, began, reported = start, time.monotonic(), time.monotonic()
        for block in blocks:
            done += len(block)
            if self.size is not None and done > self.size:
                self._check_total(done, "and more")
            if self.limit is not None and done > self.limit:
                raise DataError(
                    f"{self.url} is larger than the limit of {format_bytes(self.limit)}"
                )
            file.write(block)
            now = time.monotonic()
            if now > self.deadline:
                raise self._too_slow(done, "it is still arriving")
            if now - reported > _REPORT_SECONDS:
                reported = now
                of_total = f" of {format_bytes(total)}" if total else ""
                rate = format_bytes((done - start) / (now - began))
                log.info("%s%s, %s/s", format_bytes(done), of_total, rate)

    def _too_slow(self, received: int, reason: str) -> DataError:
        seconds = self.retries.total_seconds
        return DataError(
            f"{self.url} is too slow: {format_bytes(received)} in {seconds:.0f} s ({reason}); "
            f"try again later"
        )


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while block := _read(response):
        yield block


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_BLOCK)
    except http.client.IncompleteRead as error:
        return error.partial
    except (OSError, http.client.HTTPException) as error:
        raise RetryableError(f"the transfer broke off: {error}") from None


def _start(response: http.client.HTTPResponse) -> int:
    """Returns the first byte of the file that the server sends; it may ignore the range."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    content_range = re.match(r"bytes (\d+)-", response.headers["Content-Range"] or "")
    if not content_range:
        raise PartMismatchError("the server sent a part and did not say which")
    return int(content_range.group(1))


def _version(response: http.client.HTTPResponse) -> str | None:
    """Returns the strong ETag, or the date of the last change."""
    tag = response.headers["ETag"]
    return tag if tag and not tag.startswith("W/") else response.headers["Last-Modified"]


def _check_size(file: Path, size: int | None) -> None:
    actual = file.stat().st_size
    if size is not None and actual != size:
        raise DataError(
            f"{file} has {actual} bytes, but {size} were published; remove it, and it is "
            f"downloaded again"
        )


def _check_sum(part: Path, checksum: str | None, url: str) -> None:
    if checksum is None:
        return
    algorithm, _, expected = checksum.partition(":")
    with part.open("rb") as file:
        actual = hashlib.file_digest(file, algorithm).hexdigest()
    if actual != expected:
        part.unlink()
        raise DataError(
            f"{url} is not the published file: its {algorithm} is {actual}, expected {expected}; "
            f"the download was removed"
        )


def _check_image(part: Path, url: str) -> None:
    try:
        _ = ImageSource(part).size
    except DataError as error:
        raise DataError(str(error).replace(str(part), url)) from None


def check_free_space(folder: Path, needed: int) -> None:
    """Raises a `DataError` if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {format_bytes(free)} free, {format_bytes(needed)} are needed; "
            f"free disk space, or choose another folder"
        )


def format_size(size: int | None) -> str:
    """Returns a size in parentheses after a space; empty if it is unknown."""
    return "" if size is None else f" ({format_bytes(size)})"


def format_bytes(count: float) -> str:
    """Returns a number of bytes in decimal units.

    >>> format_bytes(6_645_013_297)
    '6.65 GB'
    """
    if count < 999.5:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.2f} GB"
