"""CIDEr, BLEU and ROUGE-L of captions, computed as the COCO caption tools compute them.

Papers report scores of these tools. The metrics therefore use the constants of the tools, and have
no `protocol` argument. BLEU and ROUGE of torchmetrics differ: BLEU is 0 without a matching 4-gram,
and ROUGE-L weights precision and recall equally and takes both from the same reference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from qwenvl_lit.metrics.per_sample import (
    PerSampleMetric,
    Where,
    answer_text,
    reference_texts,
    sample_key,
)
from qwenvl_lit.metrics.ptb import ptb_words
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Prediction

N = 4  # n of the longest n-grams
SIGMA = 6.0  # standard deviation in CIDEr-D's length penalty
BETA = 1.2  # weight of recall relative to precision in ROUGE-L

# Shape suffixes:
# R rows
# T texts: the caption of the first row, its references, the caption of the second row, ...
# W words of all texts
# K distinct n-grams of one length n
# P distinct pairs (text, n-gram in this text)


def cider(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> torch.Tensor:
    """Computes CIDEr-D of each caption of a corpus, (rows,) float64 from 0 to 10.

    The score of the corpus is the mean. The weight of an n-gram depends on all references of the
    corpus, so the score of a corpus of one row is 0.

    >>> cider([["a", "dog"], ["a", "cat"]], [[["a", "dog"]], [["the", "cat"]]])
    tensor([5.0000, 1.2500], dtype=torch.float64)
    """
    texts: list[Sequence[str]] = []
    texts_per_row = []
    for caption, others in zip(captions, references, strict=True):
        texts += [caption, *others]
        texts_per_row.append(1 + len(others))
    word_ids: dict[str, int] = {}
    words = [word_ids.setdefault(word, len(word_ids)) for text in texts for word in text]
    words_per_text = torch.tensor(list(map(len, texts)))
    return _cider(torch.tensor(words), words_per_text, torch.tensor(texts_per_row))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """Which row each text of a corpus belongs to, and which texts are references."""

    rows: int
    row: torch.Tensor  # (T,) index of the row of each text
    is_reference: torch.Tensor  # (T,) False for captions


@dataclass(frozen=True, kw_only=True, slots=True)
class _WeightedNGrams:
    """The distinct n-grams of each text for one n, sorted by text and then by n-gram."""

    kinds: int  # number of distinct n-grams in all texts, K
    text: torch.Tensor  # (P,) index of the text
    kind: torch.Tensor  # (P,) index of the n-gram, 0 ... kinds - 1
    weight: torch.Tensor  # (P,) tf-idf weight


def _cider(
    words_W: torch.Tensor, words_per_text_T: torch.Tensor, texts_per_row_R: torch.Tensor
) -> torch.Tensor:
    """Computes CIDEr-D of each row from words that are given as integers.

    Args:
        words_W: int64, the words of all texts of all rows, text after text.
        words_per_text_T: int64, the number of words of each text.
        texts_per_row_R: int64, the number of texts of each row. The first one is its caption.
    """
    rows, text_count = len(texts_per_row_R), len(words_per_text_T)
    row_T = torch.arange(rows).repeat_interleave(texts_per_row_R)
    caption_R = texts_per_row_R.cumsum(0) - texts_per_row_R  # index of each caption in T
    is_reference_T = torch.ones(text_count, dtype=torch.bool).index_fill(0, caption_R, False)
    texts = _Texts(rows=rows, row=row_T, is_reference=is_reference_T)

    # As in the published tools, the length of a text is its number of bigrams, not of words.
    length_T = (words_per_text_T - 1).clamp(min=0).double()
    penalty_T = (-((length_T[caption_R][row_T] - length_T) ** 2) / (2 * SIGMA**2)).exp()

    text_W = torch.arange(text_count).repeat_interleave(words_per_text_T)
    vocabulary, words_W = words_W.long().unique(return_inverse=True)
    similarity_T = torch.zeros(text_count, dtype=torch.float64)
    grams = words_W  # an integer that identifies the n-gram which begins at each word
    for n in range(1, N + 1):
        if n > 1:  # an n-gram is an (n - 1)-gram and the next word
            grams = grams[:-1] * len(vocabulary) + words_W[n - 1 :]
        text_of_gram = text_W[: len(grams)]
        in_one_text = text_of_gram == text_W[n - 1 :]
        if not in_one_text.any():
            break
        distinct, kinds_of_grams = grams[in_one_text].unique(return_inverse=True)
        weighted = _tf_idf(text_of_gram[in_one_text], kinds_of_grams, len(distinct), texts)
        similarity_T += _cosine(weighted, texts)
        # Renumber the n-grams to keep the integers small. An n-gram that spans two texts becomes
        # 0, and every longer n-gram that contains it spans two texts too.
        grams = torch.zeros_like(grams).masked_scatter(in_one_text, kinds_of_grams)

    reference_scores_T = similarity_T * penalty_T * is_reference_T
    scores_R = torch.zeros(rows, dtype=torch.float64).index_add(0, row_T, reference_scores_T)
    return scores_R / (texts_per_row_R - 1) / N * 10


def _tf_idf(
    text_of_gram: torch.Tensor, kind_of_gram: torch.Tensor, kinds: int, texts: _Texts
) -> _WeightedNGrams:
    """Weights each distinct n-gram of each text by tf-idf.

    All references of a row together are one document.
    """
    pairs_P, counts_P = (text_of_gram * kinds + kind_of_gram).unique(return_counts=True)
    text_P, kind_P = pairs_P // kinds, pairs_P % kinds
    row_and_kind_P = texts.row[text_P] * kinds + kind_P
    kinds_in_rows = row_and_kind_P[texts.is_reference[text_P]].unique() % kinds
    rows_with_K = torch.bincount(kinds_in_rows, minlength=kinds).clamp(min=1)
    idf_K = math.log(texts.rows) - rows_with_K.double().log()
    return _WeightedNGrams(kinds=kinds, text=text_P, kind=kind_P, weight=counts_P * idf_K[kind_P])


def _cosine(ngrams: _WeightedNGrams, texts: _Texts) -> torch.Tensor:
    """Returns the cosine similarity of each reference to the caption of its row, (T,).

    The weights of the caption are clipped to the weights of the reference. Repeating an n-gram does
    not raise the score.
    """
    text_P, weight_P = ngrams.text, ngrams.weight
    zeros_T = torch.zeros(len(texts.row), dtype=torch.float64)
    norm_T = zeros_T.index_add(0, text_P, weight_P**2).sqrt()
    zeros_R = torch.zeros(texts.rows, dtype=torch.float64)
    caption_norm_R = zeros_R.index_add(0, texts.row, norm_T * ~texts.is_reference)

    row_and_kind_P = texts.row[text_P] * ngrams.kinds + ngrams.kind
    of_reference = texts.is_reference[text_P]
    # `in_captions` is sorted: rows are in order, and each row has one caption.
    in_captions, caption_weights = row_and_kind_P[~of_reference], weight_P[~of_reference]
    in_references, weights = row_and_kind_P[of_reference], weight_P[of_reference]
    if not len(in_captions):
        return zeros_T
    nearest = torch.searchsorted(in_captions, in_references).clamp(max=len(in_captions) - 1)
    is_shared = in_captions[nearest] == in_references
    shared = torch.minimum(caption_weights[nearest], weights) * weights * is_shared
    dot_T = zeros_T.index_add(0, text_P[of_reference], shared)
    norms_T = norm_T * caption_norm_R[texts.row]
    return dot_T / torch.where(norms_T == 0, 1, norms_T)


@lru_cache(maxsize=1 << 12)  # BLEU-1 to BLEU-4 request the counts of the same captions
def bleu_counts(caption: str, references: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the counts from which BLEU of a caption is computed.

    Returns:
        A tuple of these ten counts:

        - the words of the caption
        - the words of the reference whose length is closest to that, the shorter one of two
        - the n-grams of the caption, for n = 1 to 4
        - the n-grams of the caption that also occur in a reference, for n = 1 to 4
    """
    words = ptb_words(caption)
    others = list(map(ptb_words, references))
    _, closest = min((abs(len(other) - len(words)), len(other)) for other in others)
    highest_counts: Counter[tuple[str, ...]] = Counter()
    for other in others:
        highest_counts |= _ngram_counts(other)
    totals = [max(len(words) - n, 0) for n in range(N)]
    matches = [0] * N
    for gram, times in _ngram_counts(words).items():
        matches[len(gram) - 1] += min(times, highest_counts[gram])
    return len(words), closest, *totals, *matches


def _ngram_counts(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for n in range(1, N + 1):
        counts.update(zip(*(words[start:] for start in range(n)), strict=False))
    return counts


def bleu(counts: Sequence[float], n: int) -> float:
    """Computes BLEU-n from `bleu_counts` of a caption, or from their sum over a corpus.

    Without a common word the score is 0. The constants of the published tools leave about 1e-17.
    """
    length, closest, *ngrams = counts
    if not ngrams[N]:
        return 0.0
    # The published tools add the same small constants.
    precisions = [(ngrams[N + k] + 1e-15) / (ngrams[k] + 1e-9) for k in range(n)]
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1
    return math.prod(precisions) ** (1 / n) * brevity_penalty


def rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Computes ROUGE-L, the F-measure of precision and recall of longest common subsequences.

    Precision and recall are each the maximum over all references. The two maxima may belong to
    different references.

    >>> rouge_l(["a", "b", "c"], [["a", "x", "c"], ["a", "b"]])
    0.8299319727891156
    """
    empty = ("",)  # the published tools split "" into one empty word
    caption = caption or empty
    precisions, recalls = [], []
    for reference in references:
        reference = reference or empty
        common = _longest_common_subsequence(caption, reference)
        precisions.append(common / len(caption))
        recalls.append(common / len(reference))
    precision, recall = max(precisions), max(recalls)
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, by dynamic programming."""
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for index, other in enumerate(b):
            if word == other:
                row.append(above[index] + 1)
            else:
                row.append(max(above[index + 1], row[index]))
        above = row
    return above[-1]


class CIDEr(PerSampleMetric):
    """CIDEr-D of captions, from 0 to 10. Papers report this value times 100.

    The score depends on the words of all captions and references of all ranks. Each word is stored
    as its 64-bit hash, like the row ids.
    """

    needs = "reference caption"
    dtype_of_rows = torch.int64

    def measure(self, prediction: Prediction) -> list[int] | None:
        """Returns the number of texts, the number of words of each, and the hashes of all words."""
        references = reference_texts(prediction)
        if not references:
            return None
        texts = list(map(ptb_words, (answer_text(prediction), *references)))
        numbers = [len(texts), *map(len, texts)]
        for text in texts:
            numbers.extend(map(_word_key, text))
        return numbers

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        words, words_per_text, texts_per_row = [], [], []
        for row in rows:
            words_start = 1 + int(row[0])
            texts_per_row.append(row[0])
            words_per_text.append(row[1:words_start])
            words.append(row[words_start:])
        return _cider(torch.cat(words), torch.cat(words_per_text), torch.stack(texts_per_row))

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        return math.fsum(self.row_scores(rows).tolist()) / len(rows)


_word_key = lru_cache(maxsize=1 << 17)(sample_key)


class Bleu(PerSampleMetric):
    """Corpus BLEU-n of captions, from 0 to 1."""

    needs = "reference caption"

    def __init__(self, n: int = N, *, where: Where | None = None):
        super().__init__(where=where)
        if n not in range(1, N + 1):
            raise ValueError(f"n={n}: BLEU takes n-grams of up to n = 1 to {N} words")
        self.n = n

    def measure(self, prediction: Prediction) -> tuple[int, ...] | None:
        references = reference_texts(prediction)
        if not references:
            return None
        return bleu_counts(answer_text(prediction), references)

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        return bleu(torch.stack(list(rows)).sum(0).tolist(), self.n)


class RougeL(SampleMean):
    """Mean ROUGE-L of captions, from 0 to 1."""

    needs = "reference caption"

    def score(self, prediction: Prediction) -> float | None:
        references = reference_texts(prediction)
        if not references:
            return None
        caption = ptb_words(answer_text(prediction))
        return rouge_l(caption, list(map(ptb_words, references)))
