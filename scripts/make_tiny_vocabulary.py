"""Write the tiny model's vocabulary: byte-pair merges under which every word of the demo data is one token.

python scripts/make_tiny_vocabulary.py            # writes qwenvl_lit/models/tiny.tiktoken
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
from qwenvl_lit.models.qwen_vl.tokenizer import PATTERN, TINY_VOCABULARY

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
    """Single bytes in the order of the published vocabulary: the printable ones of Latin-1 first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def learn(texts: Iterable[str]) -> list[bytes]:
    """Tokens by rank: all bytes, then merges of the most frequent pair, until every pre-token of `texts` is one token."""
    tokens = [bytes([byte]) for byte in byte_order()]
    words = Counter(
        tuple(bytes([byte]) for byte in word.encode())
        for text in texts
        for word in regex.findall(PATTERN, text)
    )
    while pairs := sum(
        (Counter(dict.fromkeys(pairwise(word), count)) for word, count in words.items()), Counter()
    ):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(b"".join(best))
        words = Counter({merged(word, best): count for word, count in words.items()})
    return tokens


def merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out: list[bytes] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


def vocabulary() -> str:
    """The file's text."""
    tokens = learn([*CHAT, *synthetic.sentences()])
    return "".join(
        f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=TINY_VOCABULARY)
    parser.parse_args().output.write_text(vocabulary())
