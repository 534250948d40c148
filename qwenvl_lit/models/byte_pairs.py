"""The byte-pair tokenizer that all families share, with vocabulary files in tiktoken's format."""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import tiktoken

from qwenvl_lit.stored_files import read_bytes
from qwenvl_lit.types import DataError

# Written by scripts/make_tiny_vocabulary.py.
TINY_VOCABULARY = Path(__file__).with_name("tiny.tiktoken")

# Splits text into pre-tokens. This is GPT-4's pattern, except that every digit is a pre-token, so
# that coordinates share ten tokens.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# From a million white space characters in a row on, tiktoken's pattern overflows its stack.
MAX_BLANKS = 500_000
_BLANKS = re.compile(r"\s+")
_SORTED_BY_PYTHON = 64  # combining marks of one character
_MARKS_IN_ONE = "\u0f73\u0f75\u0f81"  # no combining class, but they consist of combining marks


class BytePairTokenizer(ABC):
    """Byte-pair encoding of NFC-normalized text, and special tokens.

    Args:
        path: the vocabulary file.
        ranks: the rank of every token, which is its id.
        special: ids of the special tokens. They follow the ranks.
        plain: ids of further added tokens, which are not special.
    """

    def __init__(
        self,
        path: Path,
        ranks: dict[bytes, int],
        special: Mapping[str, int],
        plain: Mapping[str, int] | None = None,
    ):
        self.path = path
        self.special = dict(special)
        self.plain = dict(plain or {})
        added = {**self.special, **self.plain}
        self.vocab_size = len(ranks) + len(added)
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=added
        )
        self._names = {token_id: name.encode() for name, token_id in self.special.items()}

    @property
    @abstractmethod
    def checksum(self) -> str:
        """SHA-256 of the vocabulary."""

    @property
    @abstractmethod
    def extras(self) -> Sequence[str]:
        """Names of special tokens that text may hold if a user says so."""

    @property
    def pad_id(self) -> int:
        return self.special["<|endoftext|>"]

    @property
    def im_start_id(self) -> int:
        return self.special["<|im_start|>"]

    @property
    def im_end_id(self) -> int:
        return self.special["<|im_end|>"]

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Returns the ids of the normalized text.

        Names of special tokens in `text` are plain text, except those in `allowed_special`.

        Raises:
            ValueError: there are more than `MAX_BLANKS` white space characters in a row.
        """
        text = normalized(text)
        _check_blanks(text)
        if not allowed_special:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(
            text, allowed_special=set(allowed_special), disallowed_special=()
        )

    def decode(
        self,
        ids: Iterable[int],
        *,
        skip_special: bool = False,
        keep: Collection[int] = (),
        errors: str = "replace",
    ) -> str:
        """Returns the text of `ids`.

        Args:
            skip_special: leave out special tokens, except those in `keep`.
            errors: "replace", "ignore" or "strict", for bytes that are not UTF-8 and for ids that
                the vocabulary does not have.

        Raises:
            ValueError: with "strict", the bytes are not UTF-8 or an id is not in the vocabulary.
        """
        return b"".join(self._bytes(ids, skip_special, keep, errors)).decode("utf-8", errors)

    def stream(
        self,
        ids: Iterable[int],
        *,
        skip_special: bool = False,
        keep: Collection[int] = (),
        errors: str = "replace",
    ) -> Iterator[str]:
        """Yields `decode(ids)` in pieces, each as soon as it is certain.

        A character whose bytes are incomplete is yielded after the id that completes it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        for piece in self._bytes(ids, skip_special, keep, errors):
            if text := decoder.decode(piece):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token, or the name of a special token; b"" for other ids."""
        return self._token_bytes(token_id, skip_special=False, keep=(), errors="ignore")

    def _bytes(
        self, ids: Iterable[int], skip_special: bool, keep: Collection[int], errors: str
    ) -> Iterator[bytes]:
        for token_id in ids:
            yield self._token_bytes(token_id, skip_special, keep, errors)

    def _token_bytes(
        self, token_id: int, skip_special: bool, keep: Collection[int], errors: str
    ) -> bytes:
        if token_id in self._names:
            skipped = skip_special and token_id not in keep
            return b"" if skipped else self._names[token_id]
        if 0 <= token_id < self.vocab_size:
            return self._encoding.decode_single_token_bytes(token_id)
        if errors == "strict":
            raise ValueError(
                f"token id {token_id} is not among the {self.vocab_size} ids of {self.path}"
            )
        return "\ufffd".encode() if errors == "replace" else b""


def _check_blanks(text: str) -> None:
    if len(text) <= MAX_BLANKS:
        return
    longest = max((len(blanks) for blanks in _BLANKS.findall(text)), default=0)
    if longest > MAX_BLANKS:
        raise ValueError(
            f"text has {longest:,} white space characters in a row, and at most {MAX_BLANKS:,} can "
            f"be converted to tokens; remove them"
        )


def normalized(text: str) -> str:
    """Returns the NFC form of `text`, in a time that is linear in its length.

    Python sorts the combining marks of a character by insertion: a hundred thousand of them take
    eight seconds. They are sorted here first, which gives an equivalent text.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    for character in _MARKS_IN_ONE:
        text = text.replace(character, unicodedata.normalize("NFD", character))
    classes = map(unicodedata.combining, text)
    pieces: list[str] = []
    start = 0
    for marked, run in groupby(classes, key=bool):
        end = start + sum(1 for _ in run)
        piece = text[start:end]
        if marked and len(piece) > _SORTED_BY_PYTHON:
            piece = "".join(sorted(piece, key=unicodedata.combining))
        pieces.append(piece)
        start = end
    return unicodedata.normalize("NFC", "".join(pieces))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Returns the rank of every token, from lines of base64, a blank and the rank.

    Raises:
        DataError: the file cannot be read, a line is malformed or out of order, a token is
            repeated, or a single byte has no token. The message names file and line.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            encoded, rank = line.split()
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path}:{number}: expected base64, a blank and a rank, got {line[:80]!r}; "
                f"is the file complete?"
            ) from None
        if value != number - 1 or token in ranks:
            raise DataError(
                f"{path}:{number}: expected a new token of rank {number - 1}, "
                f"got {token!r} of rank {value}"
            )
        ranks[token] = value
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(
            f"{path}:{len(ranks)}: the file ends without the single bytes {missing[:8]}; "
            f"is it complete?"
        )
    return ranks
