"""A limit on what compressed data may expand to: a small file must not fill a disk."""

from __future__ import annotations

from pathlib import Path

from qwenvl_lit.types import DataError

# Rows of text compress by a factor of 5 to 30, and zlib's best on one repeated byte is 1032.
LARGEST_FACTOR = 200
ALWAYS_ALLOWED = 100_000_000  # bytes


def check_expansion(file: Path, compressed: int, content: int) -> None:
    """Raises a DataError if `content` bytes are more than `compressed` bytes should expand to.

    Args:
        file: for the message.
        content: the size so far, or as the file declares it.
    """
    if content > ALWAYS_ALLOWED + LARGEST_FACTOR * compressed:
        raise DataError(
            f"{file} expands to {content:,} bytes or more, over {LARGEST_FACTOR} times its size; "
            f"it is damaged, or made to fill the disk. If it is right, unpack it by hand"
        )
