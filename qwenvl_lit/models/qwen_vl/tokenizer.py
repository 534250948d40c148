"""The tokenizers of Qwen and Qwen-VL; the latter has special tokens for images and objects."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from qwenvl_lit.models.byte_pairs import BytePairTokenizer, read_ranks

EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))  # tokens without a meaning of their own
TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRAS)
SPECIALS = (
    *TEXT_SPECIALS,
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


class QwenTextTokenizer(BytePairTokenizer):
    """Byte-pair encoding of NFC-normalized text. The special ids follow the ranks of the file.

    A pickle holds only the path, so that data workers read the file themselves.

    >>> from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
    >>> tokenizer = QwenTextTokenizer(TINY_VOCABULARY)
    >>> tokenizer.decode(tokenizer.encode("a cat"))
    'a cat'
    """

    extras = EXTRAS
    names: ClassVar[Sequence[str]] = TEXT_SPECIALS

    def __init__(self, path: str | Path):
        path = Path(path)
        ranks = read_ranks(path)
        special = {name: len(ranks) + i for i, name in enumerate(self.names)}
        super().__init__(path, ranks, special)

    def __reduce__(self):
        return type(self), (self.path,)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the vocabulary file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


class QwenTokenizer(QwenTextTokenizer):
    """The tokenizer of Qwen-VL, with special tokens for markup.

    A path that is written into an image's span, as the original model does it, is decoded; padding
    in a span gives no text.

    >>> from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
    >>> tokenizer = QwenTokenizer(TINY_VOCABULARY)
    >>> tokenizer.decode(tokenizer.encode("a cat"))
    'a cat'
    >>> tokenizer.im_end_id in tokenizer.encode("<|im_end|>")
    False
    """

    names = SPECIALS

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
