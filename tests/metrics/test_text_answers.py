"""Metrics of short answers: ANLS, relaxed accuracy, GQA accuracy, multiple choice."""

import pytest
from toy_task import grounded

from qwenvl_lit.metrics.anls import ANLS, anls
from qwenvl_lit.metrics.captions import Bleu, CIDEr, RougeL
from qwenvl_lit.metrics.choice_accuracy import ChoiceAccuracy, chosen_letter
from qwenvl_lit.metrics.gqa_accuracy import GQAAccuracy, gqa_answer_official, gqa_match
from qwenvl_lit.metrics.relaxed_accuracy import (
    RelaxedAccuracy,
    relaxed_match,
    relaxed_match_official,
)
from qwenvl_lit.metrics.vqa_accuracy import VQAAccuracy
from qwenvl_lit.types import Conversation, GroundedObject, Prediction, Turn


def row(name: str, text: str, *references: str, reference: str | None = None) -> Prediction:
    conversation = Conversation(id=name, turns=(), references=references)
    return Prediction(conversation=conversation, text=text, parts=(), reference=reference)


def scored(metric, *rows: Prediction) -> float:
    metric.update(rows)
    return metric.compute().item()


# ANLS


@pytest.mark.parametrize(
    ("answer", "answers", "score"),
    [
        ("Hello  World ", ["hello world"], 1),
        ("helo world", ["goodbye", "hello world"], 1 - 1 / 11),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0),
        ("", ["x"], 0),
        ("", [""], 1),
        ("你好吗", ["你好"], 2 / 3),
    ],
)
def test_anls_is_one_minus_the_share_of_wrong_characters(answer, answers, score):
    assert anls(answer, answers) == pytest.approx(score)


def test_white_space_does_not_make_errors_cheaper():
    """One character of ten is wrong; the published script counts ten spaces as read right."""
    assert anls("abcdefghix" + " " * 10, ["abcdefghij"]) == pytest.approx(0.9)
    assert anls("abcdefghix" + " " * 10, ["abcdefghij"], protocol="official") == pytest.approx(0.95)


def test_anls_is_averaged_over_rows_and_0_below_its_threshold():
    rows = (row("a", "abcd", "abcx"), row("b", "abcd", "wxyz"), row("c", "7", reference="7"))
    assert scored(ANLS(), *rows) == pytest.approx((0.75 + 0 + 1) / 3)
    assert scored(ANLS(threshold=0.8), *rows) == pytest.approx(1 / 3)


# relaxed accuracy


@pytest.mark.parametrize(
    ("answer", "expected", "right", "official"),
    [
        ("9.5", "10", True, False),  # 5 % of 10, but 5.3 % of 9.5
        ("10.5", "10", True, True),
        ("10.52", "10", False, True),  # 5.2 % of 10, but 4.9 % of 10.52
        ("1.05", "1", True, True),
        ("0.0", "0", True, False),
        ("0.01", "0", False, False),
        ("50%", "0.5", True, True),
        ("50%", "50", False, False),
        ("-10", "-10.3", True, True),
        ("10", "-10", False, False),
        ("1,000", "1000", False, False),
        (" Yes ", "yes", True, True),
        ("yes", " yes ", True, False),
        ("inf", "inf", True, False),
        ("nan", "nan", True, False),
        ("ten", "10", False, False),
    ],
)
def test_numbers_may_deviate_by_5_percent_of_the_reference(answer, expected, right, official):
    assert relaxed_match(answer, expected) == right
    assert relaxed_match_official(answer, expected) == official


def test_one_matching_reference_is_enough():
    assert scored(RelaxedAccuracy(), row("a", "9.5", "3", "10"), row("b", "x", "y")) == 0.5
    assert scored(RelaxedAccuracy("official"), row("a", "9.5", "3", "10"), row("b", "x", "y")) == 0


# GQA


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("dog", "dog", True),
        ("It is a dog.", "dog", True),
        ("Yes, it is.", "yes", True),
        ("They are the students", "students", True),
        ("an umbrella!", "umbrella", True),
        ("a piece of cake", "piece", True),
        ("The panda", "panda", True),
        ("the panda is black", "black", True),
        ("left side of the road", "right side of the road", False),
        ("No.", "No.", True),
        ("no dog", "dog", False),
        ("3.5", "3.5", True),
    ],
)
def test_an_answer_in_a_sentence_is_recognized(answer, expected, right):
    assert gqa_match(answer, expected) == right


def test_the_published_script_splits_words():
    assert gqa_answer_official("The panda is black") == "black"
    assert gqa_answer_official("this is it") == ""
    assert gqa_answer_official("sea horse") == "horse"
    assert not gqa_match("sea horse", "horse")
    rows = (row("a", "sea horse", reference="sea horse"), row("b", "It is a dog.", reference="dog"))
    assert scored(GQAAccuracy(), *rows) == 1
    assert scored(GQAAccuracy("official"), *rows) == 0.5


# choices


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("c) two", "C"),
        ("D: a dog", "D"),
        ("A. the dog", "A"),
        ("Answer: B", "B"),
        ("The answer is C.", "C"),
        ("the correct option is (D) because", "D"),
        ("The answer is D because of the cat", "D"),
        ("A dog", None),
        ("a", "A"),
        ("I think so", None),
        ("Both", None),
        ("The answer is a dog", None),
        ("answered", None),
        ("U.S. flag", None),
        ("", None),
    ],
)
def test_the_chosen_letter_is_found(text, letter):
    assert chosen_letter(text) == letter


def test_an_answer_without_a_letter_is_wrong_but_a_row_without_one_is_left_out(caplog):
    metric = ChoiceAccuracy()
    rows = [row("a", "(B)", reference="B"), row("b", "a dog", reference="A")]
    metric.update([*rows, row("c", "A", "A. a dog"), row("d", "A", "a dog")])
    assert metric.compute() == pytest.approx(2 / 3)
    assert "1 of 4 rows left out, they have no expected letter" in caplog.text


# all metrics


def test_an_object_counts_as_its_label():
    conversation = Conversation(id="a", turns=(), references=("a dog",))
    text = "a <ref>dog</ref><box>(0,0),(15,15)</box>"
    parts = ("a ", grounded("dog", 0, 0, 1, 1))
    prediction = Prediction(conversation=conversation, text=text, parts=parts)
    assert scored(ANLS(), prediction) == 1


def answered(name: str, text: str, *expected, parts=()) -> Prediction:
    """An answer to a row with this expected answer, whose boxes are written as `[label]`."""
    turns = (Turn(role="assistant", parts=expected),)
    reference = "".join(part if isinstance(part, str) else f"[{part.label}]" for part in expected)
    conversation = Conversation(id=name, turns=turns)
    return Prediction(
        conversation=conversation, text=text, parts=parts or (text,), reference=reference
    )


@pytest.mark.parametrize(
    "metric", [ANLS, RelaxedAccuracy, GQAAccuracy, VQAAccuracy, CIDEr, RougeL, lambda: Bleu(1)]
)
def test_an_expected_answer_of_boxes_alone_is_left_out_by_metrics_of_text(metric, caplog):
    dog, wrong = grounded("dog", 0, 0, 9, 9), grounded("dog", 50, 50, 60, 60)
    unlabelled = GroundedObject(label=None, boxes=dog.boxes)
    rows = [answered("a", "red", "red"), answered("b", "x", dog, parts=(wrong,))]
    rows += [answered("c", "x", dog, ", ", dog, ".", parts=(wrong,)), answered("d", "", unlabelled)]
    measured = metric()
    measured.update(rows)
    measured.compute()
    assert measured.count == 1
    assert "3 of 4 rows left out, they have no" in caplog.text


def test_of_words_and_boxes_the_words_are_compared_with_a_warning(caplog):
    dog, wrong = grounded("dog", 0, 0, 9, 9), grounded("dog", 50, 50, 60, 60)
    rows = [answered("a", "x", "a ", dog, parts=("a ", wrong))]
    rows.append(answered("b", "a dog", "a ", GroundedObject(label="dog", boxes=())))
    assert scored(ANLS(), *rows) == 1
    assert caplog.messages == [
        "expected answers have words and boxes: metrics of text compare the words alone; "
        "metrics=grounding compares the boxes"
    ]
