import json
import math
import random
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed
import torch.multiprocessing

from qwenvl_lit.metrics.captions import Bleu, CIDEr, RougeL, bleu, bleu_counts, cider, rouge_l
from qwenvl_lit.types import Conversation, DataError, Prediction


def row(name: str, text: str, *references: str) -> Prediction:
    return Prediction(
        conversation=Conversation(id=name, turns=(), references=references), text=text, parts=()
    )


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


# -- CIDEr ------------------------------------------------------------------------------------------------------------------------


def test_cider_by_hand():
    """Every word is in the references of one row of two, or of none, and weighs log 2, which goes out of every cosine.

    A caption repeated to the letter has 1 for words and 1 for pairs, the only ones of four lengths of n-grams. One of two words and
    no pair is (1/2 + 0) / 4. A word too many: two of three words and one of two pairs are shared, and exp(-1 / 72) for the length.
    """
    same = cider([["red", "bus"], ["a", "dog"]], [[["red", "bus"]], [["the", "cat"]]])
    assert same.tolist() == pytest.approx([10 * 2 / 4, 0])
    half = cider([["old", "bus"], ["x"]], [[["red", "bus"]], [["y"]]])
    assert half.tolist() == pytest.approx([10 * (1 / 2) / 4, 0])
    longer = cider([["red", "bus", "stops"], ["x"]], [[["red", "bus"]], [["y"]]])
    cosine_of_words, cosine_of_pairs = 2 / (math.sqrt(3) * math.sqrt(2)), 1 / math.sqrt(2)
    assert longer.tolist() == pytest.approx(
        [10 * (cosine_of_words + cosine_of_pairs) / 4 * math.exp(-1 / 72), 0]
    )


def test_a_word_of_every_row_weighs_nothing_and_one_row_alone_scores_nothing():
    assert cider([["a", "dog"], ["a", "cat"]], [[["a", "fox"]], [["a", "hen"]]]).tolist() == [0, 0]
    assert cider([["a", "dog"]], [[["a", "dog"]]]).tolist() == [0]


def test_saying_a_word_more_often_gains_nothing():
    once, often = (
        cider([caption, ["x"]], [[["bus", "stops"]], [["y"]]])[0]
        for caption in (["bus", "runs"], ["bus", "bus"])
    )
    assert often == pytest.approx(
        10 * 1 / (2 * math.sqrt(2)) / 4
    )  # min(2, 1) * 1, of vectors as long as 2 and sqrt 2
    assert once == pytest.approx(10 * (1 / 2) / 4)


def plain_cider(captions, references):
    """The published formula, n-gram by n-gram."""

    def vectors(text):
        grams = Counter(
            tuple(text[i : i + n]) for n in range(1, 5) for i in range(len(text) - n + 1)
        )
        weights = {
            gram: times * (math.log(len(captions)) - math.log(max(1, rows_with[gram])))
            for gram, times in grams.items()
        }
        return [
            {gram: weight for gram, weight in weights.items() if len(gram) == n}
            for n in range(1, 5)
        ]

    rows_with = Counter()
    for others in references:
        rows_with.update(
            {
                tuple(text[i : i + n])
                for text in others
                for n in range(1, 5)
                for i in range(len(text) - n + 1)
            }
        )
    scores = []
    for caption, others in zip(captions, references, strict=True):
        total = 0
        for other in others:
            penalty = math.exp(-((max(len(caption) - 1, 0) - max(len(other) - 1, 0)) ** 2) / 72)
            for ours, theirs in zip(vectors(caption), vectors(other), strict=True):
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                total += (
                    penalty
                    * sum(min(w, theirs.get(g, 0)) * theirs.get(g, 0) for g, w in ours.items())
                    / (norms or 1)
                )
        scores.append(10 * total / 4 / len(others))
    return scores


@pytest.mark.parametrize("words", [2, 6, 40])
def test_cider_is_the_published_formula_whatever_the_corpus(words):
    rng = random.Random(words)

    def text():
        return rng.choices([f"w{n}" for n in range(words)], k=rng.choice([0, 1, 2, 3, 4, 7, 12]))

    for rows in (1, 2, 9, 30):
        captions, references = (
            [text() for _ in range(rows)],
            [[text() for _ in range(rng.randint(1, 5))] for _ in range(rows)],
        )
        assert cider(captions, references).tolist() == pytest.approx(
            plain_cider(captions, references), abs=1e-12
        )


def test_a_corpus_without_words_scores_nothing():
    assert cider([[], []], [[[]], [[], []]]).tolist() == [0, 0]


def test_the_metric_gives_the_mean_of_the_corpus_and_each_row():
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


# -- BLEU and ROUGE-L -------------------------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    counts = bleu_counts("The cat sat.", ("the cat sat down", "cat"))
    assert counts == (3, 4, 3, 2, 1, 0, 3, 2, 1, 0)
    assert (
        bleu_counts("The cat sat.", ("the cat sat down", "a cat"))[1] == 2
    )  # as near, and shorter
    assert bleu(counts, 1) == pytest.approx(math.exp(1 - 4 / 3))
    assert bleu(counts, 3) == pytest.approx(math.exp(1 - 4 / 3))


def test_bleu_counts_a_word_as_often_as_one_reference_has_it():
    assert bleu_counts("the the the", ("the cat", "the dog the"))[6] == 2
    assert bleu(bleu_counts("the the the", ("the cat", "the dog the")), 1) == pytest.approx(2 / 3)


def test_bleu_is_of_the_whole_corpus():
    pairs = [("a b c d", "a b c d"), ("x", "y z")]
    metric = Bleu(2)
    value = scored(metric, [row(str(place), *pair) for place, pair in enumerate(pairs)])
    # 4 of 5 words, 3 of 3 pairs, 5 words for 6
    assert value == pytest.approx(math.sqrt(4 / 5 * 3 / 3) * math.exp(1 - 6 / 5))


def test_bleu_has_one_to_four_words():
    with pytest.raises(DataError, match="n=5: BLEU is counted up to n-grams of 1 to 4 words"):
        Bleu(5)


def test_rouge_l_by_hand():
    """Three of four words in order, of five in the reference: precision 3/4, recall 3/5."""
    assert rouge_l(list("abcx"), [list("aybcz")]) == pytest.approx(
        2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75)
    )
    assert rouge_l(["a"], [["b"]]) == 0
    assert rouge_l([], [[]]) == 1  # as there: one empty word each
    assert scored(RougeL(), [row("1", "a dog", "A dog."), row("2", "a dog", "two cats")]) == 0.5


# -- rows and ranks ---------------------------------------------------------------------------------------------------------------

METRICS = [CIDEr, Bleu, lambda: Bleu(1), RougeL]


@pytest.mark.parametrize("metric", METRICS)
def test_batches_order_repeated_rows_and_ranks_change_nothing(metric):
    whole = scored(metric(), ROWS)
    assert scored(metric(), ROWS[:2], [], ROWS[2:], ROWS[1:3]) == whole
    assert scored(metric(), ROWS[::-1]) == whole
    rank0, rank1 = metric(), metric()
    rank0.update(ROWS[::2])
    rank1.update([*ROWS[1::2], ROWS[0]])  # row 0 fills its last batch
    rank0.merge_state(rank1)
    assert rank0.compute().item() == whole
    assert rank0.count == len(ROWS)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_without_a_reference_are_left_out_and_told(metric):
    measured = metric()
    measured.update([row("x", "a dog"), *ROWS])
    with pytest.warns(UserWarning, match="1 of 6 rows left out, they have no reference caption"):
        assert measured.compute() == scored(metric(), ROWS)


def score_on_rank(rank: int, folder: Path) -> None:
    group = {"init_method": f"file://{folder / 'meet'}", "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **group)
    values = []
    for shares in ((ROWS[::2], [*ROWS[1::2], ROWS[0]]), (ROWS, [])):
        for metric in (CIDEr(), Bleu(1), RougeL()):
            if shares[rank]:  # else it never hears of a batch
                metric.update(shares[rank])
            values.append(metric.compute().item())
    (folder / str(rank)).write_text(json.dumps(values))
    torch.distributed.destroy_process_group()


def test_two_processes_score_as_one_does(tmp_path):
    torch.multiprocessing.spawn(score_on_rank, args=(tmp_path,), nprocs=2)
    alone = [scored(metric, ROWS) for metric in (CIDEr(), Bleu(1), RougeL())]
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [alone * 2] * 2
