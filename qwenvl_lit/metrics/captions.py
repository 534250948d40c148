"""Scores of captions as the COCO caption tools give them: CIDEr, BLEU, ROUGE-L.

They are the definition that papers compare by, small constants included, so there is one protocol. torchmetrics' BLEU and ROUGE are others:
its BLEU is 0 where no 4-gram is right, its ROUGE-L weighs precision and recall alike and takes both from one reference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain

import torch

from qwenvl_lit.metrics.ptb import ptb_words
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.metrics.sample_rows import PerSampleMetric, reference_texts, said, sample_key
from qwenvl_lit.types import DataError, Prediction

N = 4  # the longest n-grams
SIGMA = 6.0  # of CIDEr-D's penalty for another length
BETA = 1.2  # how much more ROUGE-L cares for recall than for precision


def cider(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> torch.Tensor:
    """CIDEr-D of each caption of a corpus, 0 to 10, (rows,) float64; the corpus has their mean. What an n-gram weighs depends on all
    references of the corpus; a corpus of one row scores 0.

    >>> cider([["a", "dog"], ["a", "cat"]], [[["a", "dog"]], [["the", "cat"]]])
    tensor([5.0000, 1.2500], dtype=torch.float64)
    """
    texts = [
        list(chain([caption], others)) for caption, others in zip(captions, references, strict=True)
    ]
    number: dict[str, int] = {}
    words = [number.setdefault(word, len(number)) for row in texts for text in row for word in text]
    lengths = [len(text) for row in texts for text in row]
    return _cider(*map(torch.tensor, (words, lengths, [len(row) for row in texts])))


def _cider(words: torch.Tensor, lengths: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """The same of numbered words.

    Args:
        words: (W,) int64, of all texts of all rows; the first text of a row is its caption, the others are its references.
        lengths: (T,) how many words each text has.
        texts: (R,) how many texts each row has.
    """
    rows = len(texts)
    row_of = torch.arange(rows).repeat_interleave(texts)  # (T,)
    captions = texts.cumsum(0) - texts  # (R,) their places among the texts
    is_reference = torch.ones(len(lengths), dtype=torch.bool).index_fill(0, captions, False)
    text_of = torch.arange(len(lengths)).repeat_interleave(lengths)  # (W,)
    vocabulary, words = words.long().unique(return_inverse=True)
    # the published length counts pairs of words: one fewer than the words, but none of none
    pairs = (lengths - 1).clamp(min=0).double()
    penalty = (-((pairs[captions][row_of] - pairs) ** 2) / (2 * SIGMA**2)).exp()  # (T,)
    similarity = torch.zeros(len(lengths), dtype=torch.float64)
    gram = words
    for n in range(1, N + 1):
        if n > 1:  # each n-gram is one of n - 1 words and the word behind it
            gram = gram[:-1] * len(vocabulary) + words[n - 1 :]
        inside = text_of[: len(gram)] == text_of[n - 1 :]
        if not inside.any():
            break
        kinds, numbered = gram[inside].unique(return_inverse=True)
        weighed = _weigh(
            text_of[: len(gram)][inside] * len(kinds) + numbered,
            len(kinds),
            row_of,
            is_reference,
            rows,
        )
        similarity += _cosine(*weighed, len(kinds), row_of, is_reference)
        gram = torch.zeros_like(gram).masked_scatter(
            inside, numbered
        )  # small numbers again; those across texts stay outside
    scores = torch.zeros(rows, dtype=torch.float64).index_add(
        0, row_of, similarity * penalty * is_reference
    )
    return scores / (texts - 1) / N * 10


def _weigh(
    found: torch.Tensor, kinds: int, row_of: torch.Tensor, is_reference: torch.Tensor, rows: int
) -> tuple[torch.Tensor, ...]:
    """Text, kind and tf-idf weight of the different n-grams of each text, sorted by text and kind; `found`: text * kinds + kind."""
    different, times = found.unique(return_counts=True)
    text, kind = different // kinds, different % kinds
    in_rows = (row_of[text] * kinds + kind)[is_reference[text]].unique() % kinds
    rows_with = torch.bincount(in_rows, minlength=kinds).clamp(min=1)
    return text, kind, times * (math.log(rows) - rows_with.double().log())[kind]


def _cosine(
    text: torch.Tensor,
    kind: torch.Tensor,
    weight: torch.Tensor,
    kinds: int,
    row_of: torch.Tensor,
    is_reference: torch.Tensor,
) -> torch.Tensor:
    """(T,) similarity of each reference to the caption of its row, which gets nothing for saying an n-gram more often."""
    norm = torch.zeros(len(row_of), dtype=torch.float64).index_add(0, text, weight**2).sqrt()
    place = row_of[text] * kinds + kind
    of_reference = is_reference[text]
    caption_place, caption_weight = (
        place[~of_reference],
        weight[~of_reference],
    )  # sorted: one caption a row, rows in order
    norm_of_row = torch.zeros_like(norm).index_add(0, row_of, norm * ~is_reference)
    text, place, weight = text[of_reference], place[of_reference], weight[of_reference]
    if not len(caption_place):
        return torch.zeros_like(norm)
    at = torch.searchsorted(caption_place, place).clamp(max=len(caption_place) - 1)
    shared = torch.minimum(caption_weight[at], weight) * weight * (caption_place[at] == place)
    products = norm * norm_of_row[row_of]
    return torch.zeros_like(norm).index_add(0, text, shared) / torch.where(
        products == 0, 1, products
    )


@lru_cache(maxsize=1 << 12)  # BLEU-1 to 4 ask one after the other
def bleu_counts(caption: str, references: tuple[str, ...]) -> tuple[int, ...]:
    """Of a caption: its length, that of the reference closest in length, its n-grams for n = 1 to 4, and those of them that are right."""
    words, others = ptb_words(caption), [ptb_words(reference) for reference in references]
    closest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    most: Counter[tuple[str, ...]] = Counter()
    for other in others:
        most |= _grams(other)
    right = [0] * N
    for gram, times in _grams(words).items():
        right[len(gram) - 1] += min(times, most[gram])
    return len(words), closest, *(max(len(words) - n, 0) for n in range(N)), *right


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, N + 1)
        for start in range(len(words) - n + 1)
    )


def bleu(counts: Sequence[float], n: int) -> float:
    """BLEU-n of `bleu_counts`, of one caption or summed over a corpus."""
    length, closest, *grams = counts
    product = math.prod(
        (grams[N + k] + 1e-15) / (grams[k] + 1e-9) for k in range(n)
    )  # constants of the published tools
    ratio = (length + 1e-15) / (closest + 1e-9)
    return product ** (1 / n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


def rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L: the F-measure of the best precision and the best recall by longest common subsequences, be they of different references.

    >>> rouge_l(["a", "b", "c"], [["a", "x", "c"], ["a", "b"]])
    0.8299319727891156
    """
    caption = caption or ("",)  # the published tools split "" into one empty word
    common = [(_common(caption, other or ("",)), len(other or ("",))) for other in references]
    precision, recall = (
        max(c for c, _ in common) / len(caption),
        max(c / length for c, length in common),
    )
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for place, other in enumerate(b):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        above = row
    return above[-1]


class CIDEr(PerSampleMetric):
    """CIDEr-D of the captions against their references, 0 to 10; papers print 100 times that.

    The score needs the words of all captions and references of all ranks at once: each is kept as a hash of 64 bits, as row ids are.
    """

    needs = "reference caption"
    dtype_of_rows = torch.int64

    def measure(self, prediction: Prediction) -> list[int] | None:
        references = reference_texts(prediction)
        if not references:
            return None
        texts = [ptb_words(text) for text in (said(prediction), *references)]
        return [len(texts), *map(len, texts), *(_word_key(word) for text in texts for word in text)]

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        texts = torch.stack([row[0] for row in rows])
        heads = [(row, 1 + int(row[0])) for row in rows]
        return _cider(
            torch.cat([row[end:] for row, end in heads]),
            torch.cat([row[1:end] for row, end in heads]),
            texts,
        )

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        return math.fsum(self.row_scores(rows).tolist()) / len(rows)


_word_key = lru_cache(maxsize=1 << 17)(sample_key)


class Bleu(PerSampleMetric):
    """Corpus BLEU-n of the captions, 0 to 1."""

    needs = "reference caption"

    def __init__(self, n: int = N, *, where: Mapping[str, str | Sequence[str]] | None = None):
        super().__init__(where=where)
        if n not in range(1, N + 1):
            raise DataError(f"n={n}: BLEU is counted up to n-grams of 1 to {N} words")
        self.n = n

    def measure(self, prediction: Prediction) -> tuple[int, ...] | None:
        references = reference_texts(prediction)
        return bleu_counts(said(prediction), references) if references else None

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        return bleu(torch.stack(list(rows)).sum(0).tolist(), self.n)


class RougeL(SampleMean):
    """Mean ROUGE-L of the captions, 0 to 1."""

    needs = "reference caption"

    def score(self, prediction: Prediction) -> float | None:
        references = reference_texts(prediction)
        return (
            rouge_l(ptb_words(said(prediction)), [ptb_words(text) for text in references])
            if references
            else None
        )
