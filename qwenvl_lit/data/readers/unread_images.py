"""Finds images that a row without an image may mean, and that are not read."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwenvl_lit.data.readers.keys import Row, short

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
_LONGEST = 1000  # characters of a path
_AROUND = "'\"`()[]{}<>,;:!?"  # what text puts around a path


def image_columns(row: Row, read: Collection[str]) -> tuple[str, ...]:
    """Returns notes about the keys of a row that are not among `read` and hold paths of images."""
    notes = []
    for key, value in row.items():
        paths = value if isinstance(value, list) else [value]
        if key not in read and paths and all(map(_is_path, paths)):
            notes.append(
                f"the row has no image, and its key {short(key)}, which is not read, has the path "
                f"{short(paths[0])}; did you mean `images`?"
            )
    return tuple(notes)


def named_files(texts: Iterable[str], root: Path) -> Iterator[str]:
    """Yields a note for the first image file that one of the texts names, if it exists."""
    for text in texts:
        if "." not in text:
            continue
        for word in text.split():
            path = word.strip(_AROUND).rstrip(".")
            if _is_path(path) and os.path.isfile(os.path.join(root, path)):
                yield (
                    f"the row has no image, and its text names the file {short(path)}; to show the "
                    f"model the image, write <img>{path}</img>, or list it in `images`"
                )
                return


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > _LONGEST:
        return False
    return value.lower().endswith(_SUFFIXES) and "\n" not in value
