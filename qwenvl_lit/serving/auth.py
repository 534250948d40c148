"""Bearer keys: who may use the server."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from qwenvl_lit.types import DataError

SHORTEST = 8  # characters of a key
VARIABLE = "QWENVL_LIT_KEYS"  # of the environment; it names the file


class Keys:
    """The keys that clients may send. Without keys everyone is admitted."""

    def __init__(self, keys: Collection[str] = ()):
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, authorization: bytes | None) -> bool:
        """Returns whether a header `Authorization: Bearer KEY` has one of the keys.

        The time does not depend on how much of a key is right, nor on which key it is.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        sent = _digest(key.strip())
        admitted = False
        for digest in self._digests:
            admitted |= hmac.compare_digest(digest, sent)
        return admitted and scheme.lower() == b"bearer"


def read_keys(file: str) -> list[str]:
    """Returns the keys of a file, one a line; empty lines and those that start with # are none.

    Raises:
        DataError: the file cannot be read, has no key, or a key is short or not plain ASCII.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors may write a BOM
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        source = VARIABLE if os.environ.get(VARIABLE) == file else "serve.keys"
        # A key that was given in place of the file stays secret.
        shown = f"={file}" if _looks_like_a_path(file) else ""
        place = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        raise DataError(
            f"{source}{shown} cannot be read ({reason}); it is the path of a file with one key a "
            f"line{place}"
        ) from None
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise DataError(
                f"{path}:{number}: a key has at least {SHORTEST} printable ASCII characters and "
                f"no blank; make one with: openssl rand -hex 24; names go into lines of their own, "
                f"such as # alice"
            )
        keys.append(key)
    if not keys:
        raise DataError(f"{path}: there is no key in it; make one with: openssl rand -hex 24")
    return keys


def _looks_like_a_path(text: str) -> bool:
    """Returns whether a text ends as names of files do, or is too short for a key."""
    return len(text) < SHORTEST or re.search(r"\.[a-z]{2,5}$", text) is not None


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
