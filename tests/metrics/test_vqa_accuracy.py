from dataclasses import replace

import pytest

from qwenvl_lit.metrics.vqa_accuracy import (
    VQAAccuracy,
    normalize_answer,
    vqa_accuracy,
    vqa_accuracy_official,
)
from qwenvl_lit.types import Conversation, Prediction


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Yes.", "yes"),
        ("3.5", "3.5"),
        ("2.", "2"),
        ("a.m.", "am"),
        ("1,000", "1000"),
        ("red,white", "red white"),
        ("x-ray -1", "x ray 1"),
        ("1,000-foot", "1000 foot"),
        ("The Dog's", "dog's"),
        ("12:30", "12:30"),
        ("Two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("a cat and the dog", "cat and dog"),
        ("dont", "don't"),
        ("Im", "i'm"),
        ("couldnt've", "couldn't've"),
        ("somebodyd", "somebody'd"),
        ("what is this?\n", "what is this"),
        ("." * 40, ""),
    ],
)
def test_answers_are_normalized_before_they_are_compared(text, words):
    assert normalize_answer(text) == words


def test_accuracy_is_averaged_over_leaving_each_person_out():
    """k of ten people agree. Without one of these k - 1 are left, without another person k."""
    people = ["cat"] * 10
    for k, expected in (
        (0, 0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 / 3 * 8 + 1 / 3 * 2) / 10),
        (3, (7 + 3 * 2 / 3) / 10),
        (4, 1),
        (10, 1),
    ):
        answers = ["dog"] * k + people[k:]
        assert vqa_accuracy("dog", answers) == pytest.approx(expected)
        assert vqa_accuracy_official("dog", answers) == pytest.approx(expected)


def test_right_answers_that_the_published_script_takes_for_wrong():
    assert vqa_accuracy("yes", ["Yes"] * 10) == 1
    assert vqa_accuracy_official("yes", ["Yes"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 10) == 1
    assert vqa_accuracy_official("2", ["two"] * 10) == 0
    assert vqa_accuracy("the table", ["the table"] * 10) == 1
    assert vqa_accuracy_official("the table", ["the table"] * 10) == 0
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 1
    # All people agree, so their answers keep the hyphen.
    assert vqa_accuracy_official("t-shirt", ["t-shirt"] * 10) == 0
    assert vqa_accuracy("." * 33, [""] * 10) == 1
    assert vqa_accuracy_official("." * 33, [""] * 10) == 0


def test_without_ids_the_script_leaves_out_all_answers_that_are_equal():
    assert vqa_accuracy_official("yes", ["yes"] * 10, numbered=False) == 0
    assert vqa_accuracy_official("yes", ["yes"] * 5 + ["no"] * 5, numbered=False) == 0.5


def row(name: str, text: str, *people: str) -> Prediction:
    conversation = Conversation(id=name, turns=(), references=people)
    return Prediction(conversation=conversation, text=text, parts=(), reference=people[0])


@pytest.mark.parametrize(
    ("people", "score", "official"),
    [
        (["yes"], 1, 0),
        (["no"], 0, 0),
        (["yes", "no"], 1 / 2, 1 / 6),
        (["yes", "yes"], 1, 1 / 3),
        (["yes", "yes", "no"], 2 / 3, 4 / 9),
        (["yes"] * 3, 1, 2 / 3),
        (["yes"] * 3 + ["no"], 3 / 4, 3 / 4),
        (["yes", "no", "no", "no"], 1 / 4, 1 / 4),
    ],
)
def test_of_few_people_all_that_remain_have_to_agree(people, score, official):
    assert vqa_accuracy("Yes", people) == pytest.approx(score)
    assert vqa_accuracy_official("yes", people) == pytest.approx(official)


def test_rows_of_any_number_of_people_are_scored_and_rows_without_answers_left_out(caplog):
    metric = VQAAccuracy()
    metric.update([row("a", "Yes", *["yes"] * 4), row("b", "no", *["yes"] * 10)])
    metric.update([row("c", "yes", "yes")])
    expected = Prediction(conversation=Conversation(id="d", turns=()), text="4", parts=())
    metric.update([replace(expected, reference="four")])
    question = Conversation(id="e", turns=())
    metric.update([Prediction(conversation=question, text="4", parts=())])
    assert metric.compute() == 3 / 4
    assert "1 of 5 rows left out, they have no expected answer" in caplog.text


def test_the_protocol_is_correct_or_official():
    official = VQAAccuracy("official")
    official.update([row("a", "yes", *["Yes"] * 10)])
    assert official.compute() == 0
    with pytest.raises(ValueError, match="protocol=offical: expected correct or official"):
        VQAAccuracy("offical")
