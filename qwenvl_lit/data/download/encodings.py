"""Decodes bodies that a server has compressed although nobody asked it to (Content-Encoding)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from qwenvl_lit.data.download.connections import RetryableError
from qwenvl_lit.types import DataError

KNOWN = ("gzip", "x-gzip", "deflate")

_BLOCK = 1 << 20  # bytes
_ANY_HEADER = 47  # zlib's `wbits` for data with the header of gzip or of zlib
_NO_HEADER = -15


def encoding_of(header: str | None, url: str) -> str | None:
    """Returns the encoding that the header Content-Encoding names; None if there is none.

    Raises:
        DataError: the encoding is not one of `KNOWN`.
    """
    encoding = (header or "").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in KNOWN:
        raise DataError(
            f"{url} is sent with Content-Encoding {encoding[:80]!r}, and only gzip and deflate are "
            f"decoded; download it yourself"
        )
    return encoding


def decoded(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yields the decoded content in blocks of at most a megabyte, however far it expands.

    Raises:
        RetryableError: the data is broken, or ends too early.
    """
    inflate = None
    for data in blocks:
        rest = data
        while rest:
            if inflate is None:
                inflate = _decompressor(rest, encoding)
            try:
                block = inflate.decompress(rest, _BLOCK)
            except zlib.error as error:
                raise RetryableError(f"its {encoding} encoding is broken: {error}") from None
            if block:
                yield block
            rest = inflate.unconsumed_tail
            if inflate.eof:
                rest = inflate.unused_data.lstrip(b"\0")  # gzip allows several parts and padding
                inflate = None
        if inflate is not None:
            yield from _pending(inflate)
            inflate = None if inflate.eof else inflate
    if inflate is not None:
        raise RetryableError(f"its {encoding} encoding ends too early")


def _pending(inflate: zlib._Decompress) -> Iterator[bytes]:
    """Yields output of data that was consumed, but did not fit into the last block."""
    while block := inflate.decompress(b"", _BLOCK):
        yield block


def _decompressor(beginning: bytes, encoding: str) -> zlib._Decompress:
    """Returns a decompressor; some servers send deflate without zlib's header."""
    has_header = beginning[0] & 15 == 8 or encoding != "deflate"
    return zlib.decompressobj(_ANY_HEADER if has_header else _NO_HEADER)
