import pytest

from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.types import Conversation, Prediction


def score(text: str, reference: str | None, *references: str) -> float | None:
    row = Conversation(id="a", turns=(), references=references)
    prediction = Prediction(conversation=row, text=text, parts=(), reference=reference)
    return ExactMatch().score(prediction)


@pytest.mark.parametrize(
    ("text", "reference", "references", "expected"),
    [
        ("two", "two", (), 1),
        (" two\n", "two", (), 1),
        ("Two", "two", (), 0),
        ("2", "two", ("2", "a pair"), 1),
        ("two", None, ("2", "two"), 1),
        ("", "two", (), 0),
        ("<ref>dog</ref><box>(1,2),(3,4)</box>", "<ref>dog</ref><box>(1,2),(3,4)</box>", (), 1),
        ("<ref>dog</ref><box>(1,2),(3,5)</box>", "<ref>dog</ref><box>(1,2),(3,4)</box>", (), 0),
    ],
)
def test_an_answer_is_right_if_it_equals_the_expected_answer_or_a_reference(
    text, reference, references, expected
):
    assert score(text, reference, *references) == expected


def test_a_row_without_an_expected_answer_has_no_score():
    assert score("two", None) is None
