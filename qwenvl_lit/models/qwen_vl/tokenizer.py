"""Text to token ids and back, over a vocabulary file in tiktoken's format."""

from __future__ import annotations

import base64
import binascii
import codecs
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import tiktoken

TINY_VOCABULARY = Path(__file__).with_name(
    "tiny.tiktoken"
)  # made by scripts/make_tiny_vocabulary.py

# Pre-tokens. As GPT-4's pattern, but every digit stands alone, so that coordinates share ten tokens.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
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
    """Byte-pair encoding of NFC-normalised text; the special ids follow the ranks of the file.

    A pickle holds the path only, so that data workers read the file themselves.

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
        self._names = {id: name.encode() for name, id in self.special.items()}

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
        """`<ref>` to `</quad>`: the tags that a grounded text is made of."""
        return tuple(range(self.special["<ref>"], self.special["</quad>"] + 1))

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of the normalised text. Names of special tokens in it are plain text, but for those in `allowed_special`."""
        text = unicodedata.normalize("NFC", text)
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
        """Text of `ids`. `skip_special` leaves special tokens out, but for those in `keep`.

        A path written into an image span, as the original model has it, is read; other fillings of a span show nothing.
        `errors` says what becomes of bytes that are no UTF-8 and of ids that the vocabulary lacks: "replace", "ignore" or "strict".

        Raises:
            ValueError: with "strict", an id is not in the vocabulary, or the bytes are no UTF-8.
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
        """Pieces of `decode(ids)` as soon as they are certain: a character whose bytes are incomplete waits for the next id."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        for piece in self._bytes(ids, skip_special, keep, errors):
            if text := decoder.decode(piece):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def _bytes(
        self, ids: Iterable[int], skip_special: bool, keep: Collection[int], errors: str
    ) -> Iterator[bytes]:
        def tokens(ids: Iterable[int]) -> Iterator[bytes]:
            for id in ids:
                if id in self._names:
                    if not skip_special or id in keep:
                        yield self._names[id]
                elif 0 <= id < self.vocab_size:
                    yield self._encoding.decode_single_token_bytes(id)
                elif errors == "strict":
                    raise ValueError(
                        f"token id {id} is not among the {self.vocab_size} ids of {self.path}"
                    )
                elif errors == "replace":
                    yield "\ufffd".encode()

        remaining = iter(ids)
        for id in remaining:
            yield from tokens([id])
            if id == self.img_start_id:
                span = []
                for id in remaining:
                    span.append(id)
                    if id == self.img_end_id:
                        break
                path = self._written_path(span)
                yield from tokens(span) if path is None else (path, *tokens(span[-1:]))

    def _written_path(self, span: Sequence[int]) -> bytes | None:
        """What stands before the first `<imgpad>` of a closed span: byte values as ids, which are not the ids of the byte tokens."""
        if not span or span[-1] != self.img_end_id or self.img_pad_id not in span:
            return None
        values = span[: span.index(self.img_pad_id)]
        return bytes(values) if all(0 <= value < 256 for value in values) else None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank, from lines of base64, a blank and the rank.

    Raises:
        ValueError: a line is malformed or out of order, a token comes twice, or a single byte is missing; with file and line.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            encoded, rank = line.split()
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}:{number}: expected base64, a blank and a rank, got {line[:80]!r}; is the file complete?"
            ) from None
        if value != number - 1 or token in ranks:
            raise ValueError(
                f"{path}:{number}: expected a new token of rank {number - 1}, got {token!r} of rank {value}"
            )
        ranks[token] = value
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path}:{len(ranks)}: the file ends without the single bytes {missing[:8]}; is it complete?"
        )
    return ranks
