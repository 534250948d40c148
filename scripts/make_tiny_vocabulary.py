"""Writes the tiny model's vocabulary, in which every word of the demo data is one token.

python scripts/make_tiny_vocabulary.py    # writes qwenvl_lit/models/tiny.tiktoken
"""

from __future__ import annotations

import argparse
import base64
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex

from qwenvl_lit.data.demo import dataset as synthetic
from qwenvl_lit.models.byte_pairs import PATTERN, TINY_VOCABULARY

CHAT = (
    "system",
    "user",
    "assistant",
    "\n",
    "Picture 1: ",
    "You are a helpful assistant.",
    "(0,0),(9,9)",
)


def byte_order() -> list[int]:
    """Returns the single bytes in the published order: the printable ones of Latin-1 first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def learn(texts: Iterable[str]) -> list[bytes]:
    """Returns tokens by rank: all bytes, then merges of the most frequent pair of tokens.

    It stops when every pre-token of `texts` is one token.
    """
    tokens = [bytes([byte]) for byte in byte_order()]
    words: Counter[tuple[bytes, ...]] = Counter()
    for text in texts:
        for word in regex.findall(PATTERN, text):
            words[tuple(bytes([byte]) for byte in word.encode())] += 1
    while pairs := count_pairs(words):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(b"".join(best))
        words = Counter({merged(word, best): count for word, count in words.items()})
    return tokens


def count_pairs(words: Counter[tuple[bytes, ...]]) -> Counter[tuple[bytes, bytes]]:
    """Counts the words that hold a pair of adjacent tokens, for each pair."""
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for word, count in words.items():
        for pair in set(pairwise(word)):
            pairs[pair] += count
    return pairs


def merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """Returns `word` with each occurrence of `pair` as one token."""
    tokens: list[bytes] = []
    for token in word:
        if tokens and (tokens[-1], token) == pair:
            tokens[-1] += token
        else:
            tokens.append(token)
    return tuple(tokens)


def vocabulary() -> str:
    """Returns the content of the file."""
    lines = []
    for rank, token in enumerate(learn([*CHAT, *synthetic.sentences()])):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    return "".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=TINY_VOCABULARY)
    parser.parse_args().output.write_text(vocabulary())
