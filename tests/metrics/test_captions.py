import json
import math
import random
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed
from warm import run_processes

from qwenvl_lit.metrics.captions import Bleu, CIDEr, RougeL, bleu, bleu_counts, cider, rouge_l
from qwenvl_lit.types import Conversation, Prediction


def row(name: str, text: str, *references: str) -> Prediction:
    conversation = Conversation(id=name, turns=(), references=references)
    return Prediction(conversation=conversation, text=text, parts=())


ROWS = [
    row("a", "A man rides a horse.", "a man is riding a horse", "Man on a brown horse."),
    row("b", "two dogs", "Two dogs play in the snow.", "dogs in snow"),
    row("c", "", "a red bus"),
    row("d", "a red bus on the street", "a red bus"),
    row("e", "the the the the", "the street", "an empty street", "a street"),
]


def scored(metric, *batches):
    for batch in batches:
        metric.update(batch)
    return metric.compute().item()


# CIDEr


def test_cider_by_hand():
    """Each word is in the references of one row of two, or of none: its weight is log 2.

    This weight cancels in every cosine. A caption equal to its reference has a cosine of 1 for
    words and 1 for pairs, and no longer n-grams. One of two shared words and no shared pair is
    (1/2 + 0) / 4. With one word too many, two of three words and one of two pairs are shared, and
    the length penalty is exp(-1 / 72).
    """
    same = cider([["red", "bus"], ["a", "dog"]], [[["red", "bus"]], [["the", "cat"]]])
    assert same.tolist() == pytest.approx([10 * 2 / 4, 0])
    half = cider([["old", "bus"], ["x"]], [[["red", "bus"]], [["y"]]])
    assert half.tolist() == pytest.approx([10 * (1 / 2) / 4, 0])
    longer = cider([["red", "bus", "stops"], ["x"]], [[["red", "bus"]], [["y"]]])
    cosine_of_words, cosine_of_pairs = 2 / (math.sqrt(3) * math.sqrt(2)), 1 / math.sqrt(2)
    expected = 10 * (cosine_of_words + cosine_of_pairs) / 4 * math.exp(-1 / 72)
    assert longer.tolist() == pytest.approx([expected, 0])


def test_a_word_of_every_row_has_no_weight():
    assert cider([["a", "dog"], ["a", "cat"]], [[["a", "fox"]], [["a", "hen"]]]).tolist() == [0, 0]


def test_a_corpus_of_one_row_scores_zero():
    assert cider([["a", "dog"]], [[["a", "dog"]]]).tolist() == [0]


def test_repeating_a_word_gains_nothing():
    references = [[["bus", "stops"]], [["y"]]]
    once = cider([["bus", "runs"], ["x"]], references)[0]
    often = cider([["bus", "bus"], ["x"]], references)[0]
    assert once == pytest.approx(10 * (1 / 2) / 4)
    # The dot product is min(2, 1) * 1, of vectors with norms 2 and sqrt(2).
    assert often == pytest.approx(10 * 1 / (2 * math.sqrt(2)) / 4)


def ngrams(words, lengths=range(1, 5)) -> list[tuple[str, ...]]:
    found = []
    for n in lengths:
        found += [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return found


def plain_cider(captions, references):
    """The published formula, n-gram by n-gram."""
    rows_with = Counter()
    for texts in references:
        rows_with.update({gram for text in texts for gram in ngrams(text)})

    def vector(text, n):
        weights = {}
        for gram, times in Counter(ngrams(text, [n])).items():
            weights[gram] = times * (math.log(len(captions)) - math.log(max(1, rows_with[gram])))
        return weights

    scores = []
    for caption, texts in zip(captions, references, strict=True):
        total = 0
        for text in texts:
            lengths = max(len(caption) - 1, 0), max(len(text) - 1, 0)
            penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / 72)
            for n in range(1, 5):
                ours, theirs = vector(caption, n), vector(text, n)
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                dot = sum(min(w, theirs.get(g, 0)) * theirs.get(g, 0) for g, w in ours.items())
                total += penalty * dot / (norms or 1)
        scores.append(10 * total / 4 / len(texts))
    return scores


@pytest.mark.parametrize("words", [2, 6, 40])
def test_cider_equals_the_published_formula_on_random_corpora(words):
    rng = random.Random(words)

    def texts(count):
        vocabulary = [f"w{n}" for n in range(words)]
        lengths = [0, 1, 2, 3, 4, 7, 12]
        return [rng.choices(vocabulary, k=rng.choice(lengths)) for _ in range(count)]

    for rows in (1, 2, 9, 30):
        captions = texts(rows)
        references = [texts(rng.randint(1, 5)) for _ in range(rows)]
        expected = plain_cider(captions, references)
        assert cider(captions, references).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_corpus_without_words_scores_zero():
    assert cider([[], []], [[[]], [[], []]]).tolist() == [0, 0]


def test_the_metric_is_the_mean_of_the_row_scores():
    metric = CIDEr()
    whole = scored(metric, ROWS)
    each = metric.row_scores(list(metric.rows().values()))
    assert whole == pytest.approx(each.mean().item())
    words = [
        ["a", "man", "rides", "a", "horse"],
        ["two", "dogs"],
        [],
        ["a", "red", "bus", "on", "the", "street"],
        ["the"] * 4,
    ]
    references = [
        [["a", "man", "is", "riding", "a", "horse"], ["man", "on", "a", "brown", "horse"]],
        [["two", "dogs", "play", "in", "the", "snow"], ["dogs", "in", "snow"]],
        [["a", "red", "bus"]],
        [["a", "red", "bus"]],
        [["the", "street"], ["an", "empty", "street"], ["a", "street"]],
    ]
    assert sorted(each.tolist()) == pytest.approx(sorted(plain_cider(words, references)))


# BLEU and ROUGE-L


def test_bleu_by_hand():
    counts = bleu_counts("The cat sat.", ("the cat sat down", "cat"))
    assert counts == (3, 4, 3, 2, 1, 0, 3, 2, 1, 0)
    # 4 words and 2 words are equally close to 3: the shorter reference counts.
    assert bleu_counts("The cat sat.", ("the cat sat down", "a cat"))[1] == 2
    assert bleu(counts, 1) == pytest.approx(math.exp(1 - 4 / 3))
    assert bleu(counts, 3) == pytest.approx(math.exp(1 - 4 / 3))


@pytest.mark.parametrize("caption", ["a dog runs", "dog", ""])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_without_a_common_word_is_zero(caption, n):
    assert bleu(bleu_counts(caption, ("the cat sat",)), n) == 0


def test_bleu_counts_a_word_at_most_as_often_as_one_reference_has_it():
    assert bleu_counts("the the the", ("the cat", "the dog the"))[6] == 2
    assert bleu(bleu_counts("the the the", ("the cat", "the dog the")), 1) == pytest.approx(2 / 3)


def test_bleu_is_computed_over_the_whole_corpus():
    pairs = [("a b c d", "a b c d"), ("x", "y z")]
    metric = Bleu(2)
    value = scored(metric, [row(str(index), *pair) for index, pair in enumerate(pairs)])
    # 4 of 5 words and 3 of 3 pairs are right; 5 words against 6 in the references
    assert value == pytest.approx(math.sqrt(4 / 5 * 3 / 3) * math.exp(1 - 6 / 5))


def test_bleu_takes_n_from_1_to_4():
    message = "n=5: BLEU takes n-grams of up to n = 1 to 4 words"
    with pytest.raises(ValueError, match=message):
        Bleu(5)


def test_rouge_l_by_hand():
    """Three words in order, of four in the caption and five in the reference."""
    precision, recall = 3 / 4, 3 / 5
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(list("abcx"), [list("aybcz")]) == pytest.approx(expected)
    assert rouge_l(["a"], [["b"]]) == 0
    assert rouge_l([], [[]]) == 1  # one empty word each, as in the published tools
    assert scored(RougeL(), [row("1", "a dog", "A dog."), row("2", "a dog", "two cats")]) == 0.5


# rows and ranks

METRICS = [CIDEr, Bleu, lambda: Bleu(1), RougeL]


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_does_not_depend_on_batches_order_repetition_or_ranks(metric):
    whole = scored(metric(), ROWS)
    assert scored(metric(), ROWS[:2], [], ROWS[2:], ROWS[1:3]) == whole
    assert scored(metric(), ROWS[::-1]) == whole
    rank0, rank1 = metric(), metric()
    rank0.update(ROWS[::2])
    rank1.update([*ROWS[1::2], ROWS[0]])  # row 0 fills the last batch of rank 1
    rank0.merge_state(rank1)
    assert rank0.compute().item() == whole
    assert rank0.count == len(ROWS)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_without_a_reference_are_left_out_with_a_warning(metric, caplog):
    measured = metric()
    measured.update([row("x", "a dog"), *ROWS])
    assert measured.compute() == scored(metric(), ROWS)
    assert "1 of 6 rows left out, they have no reference caption" in caplog.text


def score_on_rank(rank: int, folder: Path) -> None:
    group = {"init_method": f"file://{folder / 'meet'}", "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **group)
    values = []
    for shares in ((ROWS[::2], [*ROWS[1::2], ROWS[0]]), (ROWS, [])):
        for metric in (CIDEr(), Bleu(1), RougeL()):
            if shares[rank]:  # the second time rank 1 gets no batch at all
                metric.update(shares[rank])
            values.append(metric.compute().item())
    (folder / str(rank)).write_text(json.dumps(values))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_score_of_one(tmp_path):
    run_processes(score_on_rank, tmp_path, count=2)
    alone = [scored(metric, ROWS) for metric in (CIDEr(), Bleu(1), RougeL())]
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [alone * 2] * 2
