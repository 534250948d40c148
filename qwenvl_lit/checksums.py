"""Checksums of weights, which are written with the weights and verified before they are used.

A checkpoint is a zip file, and its zip comment holds the sha256 of the rest. There is
no separate file that a crash, a copy or a rename could lose, and torch and zip tools can still read
the checkpoint. A
folder of weights has a file `SHA256SUMS`, which `sha256sum -c` can also read. Files without a
checksum are not verified.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from qwenvl_lit.cores import available_cores
from qwenvl_lit.types import DataError

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
# Other files, such as config.json, have no checksum, so that users may edit them.
SUMMED = ("*.safetensors", "*.bin", "*.tiktoken")

_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\]+)")
_MAX_SUMS_BYTES = 1 << 20
_BLOCK = 1 << 22  # bytes; large enough that hashing and disk do not wait for Python
_ANNOUNCED = 5 * 10**9  # bytes; a message announces a larger file, because verifying it takes long

# The last record of a zip file: signature, 16 bytes, length of the comment, comment.
_END = struct.Struct("<4s16sH")
_SIGNATURE = b"PK\5\6"
_PREFIX = b"sha256:"
_COMMENT_BYTES = len(_PREFIX) + 64


@contextmanager
def sealed(file: BinaryIO) -> Iterator[Writer]:
    """Yields a writer for a zip file.

    At the end, stores the sha256 of the written bytes in the zip comment.

    Args:
        file: a new file, open for writing.
    """
    with ThreadPoolExecutor(1) as pool:
        writer = Writer(file, pool)
        yield writer
    signature, _, comment_bytes = _END.unpack(writer.end.rjust(_END.size, b"\0"))
    if signature != _SIGNATURE or comment_bytes:
        return  # not a zip file
    comment = _PREFIX + writer.sha256.hexdigest().encode()
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", len(comment)) + comment)


class Writer:
    """Writes to a file and hashes the same bytes in another thread."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor):
        self.sha256 = hashlib.sha256()
        self.end = b""  # the last bytes written
        self._file = file
        self._pool = pool

    def write(self, data: Any) -> int:
        hashed = self._pool.submit(self.sha256.update, data)
        try:
            count = self._file.write(data)
        finally:
            hashed.result()  # `data` may be overwritten after this call
        self.end = (self.end + bytes(data[-_END.size :]))[-_END.size :]
        return count

    def flush(self) -> None:
        self._file.flush()


def write_sums(folder: Path) -> None:
    """Writes the `SHA256SUMS` of the weights in a folder."""
    lines = []
    for pattern in SUMMED:
        for file in sorted(folder.glob(pattern)):
            lines.append(f"{_sha256(file)}  {file.name}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify(path: Path) -> None:
    """Compares weights with their checksums, if they have any.

    Only local rank 0 verifies. A file that has been verified is not read again in this process
    unless it changes.

    Args:
        path: a checkpoint, a file in a folder with `SHA256SUMS`, or such a folder.

    Raises:
        DataError: a file is not as it was written, or cannot be read.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    folder = path if path.is_dir() else path.parent
    sums = _read_sums(folder / SUMS)
    expected_sums = {}
    for name, expected in sums.items():
        file = folder / name
        if file.is_file() and path in (folder, file):
            expected_sums[file] = expected
    advice = f"if it was changed on purpose, remove it from {SUMS}"
    # Shards are hashed at the same time: one thread takes 10 s or more for a full model.
    with ThreadPoolExecutor(available_cores()) as pool:
        compare = partial(_compare, advice=advice)
        for _ in pool.map(compare, expected_sums, expected_sums.values()):
            pass  # raises the error of the first damaged file
    if path.name not in sums and path.is_file():
        with path.open("rb") as stream:
            sealed_with = _expected_in(stream)
        if sealed_with:
            _compare(
                path, sealed_with, advice="copy it again, or use another checkpoint of the run"
            )


def _compare(file: Path, expected: str, *, advice: str) -> None:
    status = file.stat()
    actual = _actual(file, status.st_size, status.st_mtime_ns)
    if actual != expected:
        raise DataError(
            f"{file} is damaged: its sha256 is {actual[:16]}..., expected "
            f"{expected[:16]}...; {advice}. To use it anyway: verify=false"
        )


@lru_cache
def _actual(file: Path, size: int, _changed: int) -> str:
    if size > _ANNOUNCED:
        log.warning("verifying the checksum of %s (verify=false skips this)", file)
    try:
        return _sha256(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _sha256(file: Path) -> str:
    """Returns the sha256 of a file. The comment of a sealed file is left out."""
    with file.open("rb") as stream:
        rest = os.fstat(stream.fileno()).st_size
        is_sealed = _expected_in(stream) is not None
        if is_sealed:
            rest -= 2 + _COMMENT_BYTES
        stream.seek(0)
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        while rest > 0 and (count := stream.readinto(buffer[: min(rest, _BLOCK)])):
            digest.update(buffer[:count])
            rest -= count
        if is_sealed:
            digest.update(b"\0\0")  # the length of the comment, which was still empty
        return digest.hexdigest()


def _expected_in(stream: BinaryIO) -> str | None:
    """Returns the checksum in the comment of a zip file; None if it has none."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _END.size - _COMMENT_BYTES))
    end = stream.read()
    if len(end) != _END.size + _COMMENT_BYTES:
        return None
    signature, _, comment_bytes = _END.unpack_from(end)
    comment = end[_END.size :]
    is_sealed = signature == _SIGNATURE and comment_bytes == _COMMENT_BYTES
    if not is_sealed or not comment.startswith(_PREFIX):
        return None
    return comment[len(_PREFIX) :].decode("latin-1")


def _read_sums(file: Path) -> dict[str, str]:
    """Returns the checksums by file name; lines of another kind are ignored."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        text = stream.read(_MAX_SUMS_BYTES).decode("utf-8", errors="replace")
    sums = {}
    for line in text.split("\n"):
        match = _LINE.fullmatch(line.rstrip("\r"))
        if match:
            sums[match[2]] = match[1]
    return sums
