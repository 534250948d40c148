"""Scores of answers yes and no, with values that can be counted by hand."""

import math

import pytest

from qwenvl_lit.metrics.yes_no import (
    NEITHER,
    NO,
    YES,
    MMEScore,
    YesF1,
    YesNoAccuracy,
    YesPrecision,
    YesRatio,
    YesRecall,
    yes_or_no,
    yes_or_no_of_mme,
    yes_or_no_of_pope,
)
from qwenvl_lit.types import Conversation, Prediction


@pytest.mark.parametrize(
    ("answer", "correct", "pope", "mme"),
    [
        ("yes", YES, YES, YES),
        ("Yes, there is a dog.", YES, YES, YES),
        ("no", NO, NO, NO),
        ("No, there is no dog.", NO, NO, NO),
        ("NO", NO, YES, NO),
        ("No\nIt is a cat", NO, YES, NO),
        ("There is not a dog", NO, NO, NEITHER),
        ("It is a cat. There is no dog", NO, YES, NEITHER),
        ("Yes. There is no cat", YES, YES, YES),
        ("Yes, and there is no cat", YES, NO, YES),
        ("Nothing", NEITHER, YES, NO),
        ("Now I see a dog", NEITHER, YES, NO),
        ("A dog", NEITHER, YES, NEITHER),
        ("", NEITHER, YES, NEITHER),
    ],
)
def test_answers_are_read_by_their_words_or_as_the_scripts_read_them(answer, correct, pope, mme):
    assert yes_or_no(answer) == correct
    assert yes_or_no_of_pope(answer) == pope
    assert yes_or_no_of_mme(answer) == mme


def rows(*answers: tuple[str, str], images: str = "") -> list[Prediction]:
    """Predictions from pairs of an answer and an expected answer."""
    predictions = []
    for number, (text, expected) in enumerate(answers):
        columns = {"image_name": images[number]} if images else {}
        row = Conversation(id=str(number), turns=(), references=(expected,), columns=columns)
        predictions.append(Prediction(conversation=row, text=text, parts=(), reference=None))
    return predictions


def score(metric, predictions) -> float:
    metric.update(predictions)
    total = float(metric.compute())
    assert metric.evaluate(predictions)[0] == pytest.approx(total, nan_ok=True)
    return total


# Of yes: 3 rows, of no: 3. Answered: 3 yes of which 2 are right, 2 no of which 1, and one neither.
SIX = [
    ("Yes", "yes"),
    ("Yes.", "Yes"),
    ("No", "yes"),
    ("no", "no"),
    ("yes", "No."),
    ("A cat", "no"),
]


@pytest.mark.parametrize(
    ("metric", "correct", "official"),
    [  # to POPE's script, "A cat" is a yes
        (YesNoAccuracy, 3 / 6, 3 / 6),
        (YesPrecision, 2 / 3, 2 / 4),
        (YesRecall, 2 / 3, 2 / 3),
        (YesF1, 2 / 3, 2 * (1 / 2 * 2 / 3) / (1 / 2 + 2 / 3)),
        (YesRatio, 3 / 6, 4 / 6),
    ],
)
def test_scores_of_answers_yes(metric, correct, official):
    assert score(metric(), rows(*SIX)) == pytest.approx(correct)
    assert score(metric("official"), rows(*SIX)) == pytest.approx(official)


@pytest.mark.parametrize("metric", [YesPrecision, YesRecall, YesF1])
def test_scores_without_any_yes_are_0(metric):
    assert score(metric(), rows(("no", "no"))) == 0


@pytest.mark.parametrize("metric", [YesNoAccuracy, YesPrecision, YesF1, MMEScore])
def test_the_score_of_a_row_says_whether_it_is_right(metric):
    _, scores = metric().evaluate(rows(*SIX, images="aabbcc"))
    assert sorted(scores.values()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("metric", [YesNoAccuracy, YesRatio, YesF1, MMEScore])
def test_rows_with_other_answers_are_left_out(metric, caplog):
    assert math.isnan(score(metric(), rows(("yes", "a dog"), images="a")))
    assert "they have no expected answer yes or no" in caplog.text


def test_mme_adds_the_images_with_two_right_answers_to_the_right_answers():
    # Image a: both right. b: one right. c: none.
    answers = [("yes", "yes"), ("no", "no"), ("yes", "yes"), ("yes", "no")]
    answers += [("A cat", "yes"), ("Now yes", "no")]
    predictions = rows(*answers, images="aabbcc")
    assert score(MMEScore(), predictions) == pytest.approx(3 / 6 + 1 / 3)
    # To MME's script, "Now yes" is a no.
    assert score(MMEScore("official"), predictions) == pytest.approx(4 / 6 + 1 / 3)


def test_all_answers_of_mme_right_give_2_and_the_same_name_is_the_same_image():
    answers = [("yes", "yes"), ("no", "no")] * 2
    assert score(MMEScore(), rows(*answers, images="abab")) == 2
    assert score(MMEScore(), rows(*answers[:3], ("yes", "no"), images="aabb")) == 0.75 + 0.5


def test_mme_leaves_out_rows_without_the_name_of_their_image(caplog):
    assert math.isnan(score(MMEScore(), rows(("yes", "yes"))))
    assert "no name of its image" in caplog.text


@pytest.mark.parametrize("metric", [YesNoAccuracy, YesF1, MMEScore])
def test_another_protocol_is_refused(metric):
    with pytest.raises(ValueError, match="protocol=mine: expected correct or official"):
        metric("mine")
