"""Converts text to token ids and back, with a vocabulary file in tiktoken's format."""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
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
EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))  # tokens without a meaning of their own
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *EXTRAS,
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<img>",
    "</img>",
    "<imgpad>",
)


class QwenTokenizer:
    """Byte-pair encoding of NFC-normalized text. The special ids follow the ranks of the file.

    A pickle holds only the path, so that data workers read the file themselves.

    >>> tokenizer = QwenTokenizer(TINY_VOCABULARY)
    >>> tokenizer.decode(tokenizer.encode("a cat"))
    'a cat'
    >>> tokenizer.im_end_id in tokenizer.encode("<|im_end|>")
    False
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        ranks = read_ranks(self.path)
        self.special = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
        self.vocab_size = len(ranks) + len(SPECIALS)
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self._names = {token_id: name.encode() for name, token_id in self.special.items()}

    def __reduce__(self):
        return type(self), (self.path,)

    @property
    def pad_id(self) -> int:
        return self.special["<|endoftext|>"]

    @property
    def im_start_id(self) -> int:
        return self.special["<|im_start|>"]

    @property
    def im_end_id(self) -> int:
        return self.special["<|im_end|>"]

    @property
    def img_start_id(self) -> int:
        return self.special["<img>"]

    @property
    def img_end_id(self) -> int:
        return self.special["</img>"]

    @property
    def img_pad_id(self) -> int:
        return self.special["<imgpad>"]

    @property
    def tag_ids(self) -> tuple[int, ...]:
        """`<ref>` to `</quad>`, the tags of grounded text."""
        return tuple(range(self.special["<ref>"], self.special["</quad>"] + 1))

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

        A path that is written into an image's span, as the original model does it, is decoded;
        padding in a span gives no text.

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

    def _bytes(
        self, ids: Iterable[int], skip_special: bool, keep: Collection[int], errors: str
    ) -> Iterator[bytes]:
        remaining = iter(ids)
        for token_id in remaining:
            yield self._token_bytes(token_id, skip_special, keep, errors)
            if token_id == self.img_start_id:
                span = self._read_span(remaining)
                path = self._path_in(span)
                if path is not None:
                    yield path
                    span = span[-1:]
                for inner in span:
                    yield self._token_bytes(inner, skip_special, keep, errors)

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

    def _read_span(self, ids: Iterator[int]) -> list[int]:
        """Returns the ids up to `</img>`, included; all ids if there is none."""
        span: list[int] = []
        for token_id in ids:
            span.append(token_id)
            if token_id == self.img_end_id:
                break
        return span

    def _path_in(self, span: Sequence[int]) -> bytes | None:
        """Returns the path that is written before the first `<imgpad>` of a closed span.

        Its bytes are written as ids 0 to 255, which are not the ids of the tokens of single bytes.
        """
        if not span or span[-1] != self.img_end_id or self.img_pad_id not in span:
            return None
        values = span[: span.index(self.img_pad_id)]
        return bytes(values) if all(0 <= value < 256 for value in values) else None


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
