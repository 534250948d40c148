"""Converts text to token ids and back, with the vocabulary of Qwen2.5-VL or Qwen3-VL."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwenvl_lit.models.byte_pairs import PATTERN, BytePairTokenizer, read_ranks
from qwenvl_lit.stored_files import read_json_object
from qwenvl_lit.types import DataError
from qwenvl_lit.value_types import brief, matches

TOKENIZER = "tokenizer.json"
# Tokens that only the processor writes. Text that could hold them could forge roles, ends of turns
# and images.
MARKUP = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The names that tokenizer_config.json of Qwen/Qwen2.5-VL-7B-Instruct adds to the ranks, from id
# 151643 on.
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN = (  # not special: text that has these words has the tokens
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
PLAIN_QWEN3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")


class Vocabulary(NamedTuple):
    """Tokens by id. The added tokens follow the ranks."""

    ranks: dict[bytes, int]
    special: dict[str, int]
    plain: dict[str, int]


class Qwen2Tokenizer(BytePairTokenizer):
    """Byte-pair encoding of NFC-normalized text, equal to the published `tokenizer.json`.

    A pickle holds only the path, so that data workers read the file themselves.

    Args:
        path: a `tokenizer.json`; or a file of ranks in tiktoken's format, such as `qwen.tiktoken`,
            to which the published names are added.
        think: whether the names that Qwen3 has added are among them, such as `<think>`.

    >>> from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
    >>> tokenizer = Qwen2Tokenizer(TINY_VOCABULARY)
    >>> tokenizer.decode(tokenizer.encode("a <think>"))
    'a <think>'
    >>> tokenizer.im_end_id in tokenizer.encode("<|im_end|>")
    False

    Raises:
        DataError: the file is damaged, or is of another kind of tokenizer.
    """

    def __init__(self, path: str | Path, *, think: bool = True):
        path = Path(path)
        self.think = think
        if path.suffix == ".json":
            self.vocabulary = read_tokenizer(path)
        else:
            self.vocabulary = with_published_names(read_ranks(path), think=think)
        super().__init__(path, *self.vocabulary)

    def __reduce__(self):
        return _unpickled, (self.path, self.think)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the vocabulary, in whichever format it is stored."""
        content = hashlib.sha256(repr((self.special, self.plain)).encode())
        for token in sorted(self.vocabulary.ranks, key=self.vocabulary.ranks.__getitem__):
            content.update(base64.b64encode(token) + b"\n")
        return content.hexdigest()

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of special tokens that text may hold if a user says so."""
        return tuple(name for name in self.special if name not in MARKUP)

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Returns the ids of the normalized text; see `BytePairTokenizer.encode`."""
        return super().encode(text, allowed_special={*allowed_special, *self.plain})


def _unpickled(path: Path, think: bool) -> Qwen2Tokenizer:
    return Qwen2Tokenizer(path, think=think)


def with_published_names(ranks: dict[bytes, int], *, think: bool) -> Vocabulary:
    """Returns a vocabulary with the added tokens of the published checkpoints."""
    names = (*SPECIALS, *PLAIN, *(PLAIN_QWEN3 if think else ()))
    ids = {name: len(ranks) + index for index, name in enumerate(names)}
    special = {name: ids.pop(name) for name in SPECIALS}
    return Vocabulary(ranks, special, ids)


def read_tokenizer(file: Path) -> Vocabulary:
    """Reads a `tokenizer.json` of Qwen2's kind: byte pairs, merged in the order of their ids.

    Raises:
        DataError: the file is damaged, or of another kind.
    """
    content = read_json_object(file)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not matches(vocabulary, dict[str, int]):
        raise _unknown(file, "it has no vocabulary")
    _check_steps(file, content)
    ranks: dict[bytes, int] = {}
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    for text, rank in vocabulary.items():
        try:
            ranks[bytes(map(to_byte.__getitem__, text))] = rank
        except KeyError:
            raise _unknown(file, f"its token {text[:80]!r} is not of bytes") from None
    if sorted(ranks.values()) != list(range(len(vocabulary))):
        raise _unknown(file, "its ids are not consecutive")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise _unknown(file, "it lacks single bytes")
    _check_merges(file, model.get("merges"), vocabulary)
    special, plain = _added(file, content.get("added_tokens"), len(ranks))
    return Vocabulary(ranks, special, plain)


def _check_steps(file: Path, content: Mapping[str, Any]) -> None:
    """Checks that text is normalized and split as Qwen2 does it."""
    if content["model"].get("type") != "BPE" or content["model"].get("dropout"):
        raise _unknown(file, f"its model is {brief(content['model'].get('type'))}")
    normalizer, splitter = content.get("normalizer"), content.get("pre_tokenizer")
    if not isinstance(normalizer, dict) or normalizer.get("type") != "NFC":
        raise _unknown(file, "it does not normalize text to NFC")
    steps = splitter.get("pretokenizers") if isinstance(splitter, dict) else None
    first = steps[0] if isinstance(steps, list) and steps else None
    if not isinstance(first, dict) or first.get("pattern") != {"Regex": PATTERN}:
        raise _unknown(file, "it splits text in another way")


def _check_merges(file: Path, merges: Any, vocabulary: Mapping[str, int]) -> None:
    """Checks that the pairs of tokens are merged in the order of the ids that they give.

    tiktoken merges in this order. Two pairs may give the same token.
    """
    if not isinstance(merges, list):
        raise _unknown(file, "it has no merges")
    last = 0
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not matches(pair, list[str]) or len(pair) != 2:
            raise _unknown(file, f"its merge {brief(merge)} is not a pair")
        merged = vocabulary.get("".join(pair), -1)
        if merged < last:
            raise _unknown(file, f"its merge {brief(merge)} is not in the order of the ids")
        last = merged


def _added(file: Path, entries: Any, first: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the ids of the special and of the other added tokens by name."""
    special: dict[str, int] = {}
    plain: dict[str, int] = {}
    if not matches(entries, list[dict[str, str | int | bool]]):
        raise _unknown(file, "it has no added tokens")
    for entry in entries:
        name, token_id = entry.get("content"), entry.get("id")
        if not isinstance(name, str) or not name or not isinstance(token_id, int):
            raise _unknown(file, f"its added token {brief(entry)} has no content or no id")
        kind = special if entry.get("special") else plain
        kind[name] = token_id
    missing = [name for name in MARKUP if name not in special]
    if missing:
        raise _unknown(file, f"it has no special token {', '.join(missing)}")
    ids = sorted([*special.values(), *plain.values()])
    if ids != list(range(first, first + len(ids))):
        raise _unknown(file, f"the ids of its added tokens are not consecutive from {first} on")
    return special, plain


def _unknown(file: Path, reason: str) -> DataError:
    return DataError(
        f"{file} is not a tokenizer of Qwen2.5-VL or Qwen3-VL: {reason}; take the tokenizer.json "
        f"of the published checkpoint"
    )


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns for each token the pair of tokens that it is merged from, in the order of the ids.

    These are the published merges. A token of bytes that no pair gives has none.
    """
    pairs = []
    for token, rank in ranks.items():
        parts = _split(token, ranks, rank) if len(token) > 1 else []
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def _split(token: bytes, ranks: Mapping[bytes, int], limit: int) -> Sequence[bytes]:
    """Returns the parts of a token, of ranks below `limit`, before the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        best = min(range(len(merged)), key=merged.__getitem__)
        if merged[best] >= limit:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the content of the `tokenizer.json` of a vocabulary."""
    names = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(map(names.__getitem__, token))

    added = []
    for name, token_id in sorted({**vocabulary.special, **vocabulary.plain}.items(), key=_id):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = name in vocabulary.special
        added.append({"id": token_id, "content": name, **flags, "special": special})
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    byte_level["use_regex"] = False
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, byte_level],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text(token): rank for token, rank in vocabulary.ranks.items()},
            "merges": [f"{text(a)} {text(b)}" for a, b in merges_of(vocabulary.ranks)],
        },
    }


def _id(entry: tuple[str, int]) -> int:
    return entry[1]
