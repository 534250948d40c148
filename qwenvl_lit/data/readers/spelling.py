"""Recognizes keys and values that are nearly those that are read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

_SIMILARITY = 0.8  # of two words of five letters that differ in one


def is_same(word: str, other: str) -> bool:
    """Tells whether two words differ only in case, blanks, hyphens and underscores."""
    return _letters(word) == _letters(other)


def meant(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that `word` is a misspelling of; None if there is none.

    >>> meant("imgaes", ["query", "images"]), meant("image_id", ["query", "images"])
    ('images', None)
    """
    return _meant(word, tuple(known))


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown word; empty if no known word is near."""
    near = meant(word, known) if isinstance(word, str) else None
    return "" if near is None else f"; did you mean {near}?"


@lru_cache(maxsize=4096)
def _meant(word: str, known: tuple[str, ...]) -> str | None:
    letters = _letters(word)
    candidates = _by_letters(known)
    if letters in candidates:
        return candidates[letters]
    if any(map(str.isdigit, letters)):
        return None  # such as `image2`, a further column
    similar_length = [name for name in candidates if abs(len(name) - len(letters)) <= 1]
    nearest = difflib.get_close_matches(letters, similar_length, n=1, cutoff=_SIMILARITY)
    return candidates[nearest[0]] if nearest else None


@lru_cache(maxsize=64)
def _by_letters(known: tuple[str, ...]) -> dict[str, str]:
    return {_letters(name): name for name in known}


def _letters(word: str) -> str:
    return re.sub(r"[\s_-]", "", word).lower()
