import pytest
from toy_task import grounded

from qwenvl_lit.metrics.suggest import suggest_metrics
from qwenvl_lit.types import Conversation, Turn


def row(*answers: str, boxes=False, options=()) -> Conversation:
    turns = [Turn(role="user", parts=("?",))]
    if boxes:
        turns.append(Turn(role="assistant", parts=(*answers, grounded("it", 0, 0, 2, 2), ".")))
    elif answers:
        turns.append(Turn(role="assistant", parts=answers[:1]))
    references = answers if len(answers) > 1 else ()
    return Conversation(id="1", turns=tuple(turns), references=references, options=options)


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ([row(boxes=True)] * 3 + [row("yes")], "grounding"),
        ([row("a cat beside ", boxes=True)], "grounding"),
        ([row("a dog on a lawn in the sun", "a brown dog sits on the grass")], "caption"),
        ([row("a long answer with a good many words")], "caption"),
        ([row("12"), row("3.5%"), row("$1,200"), row("no")], "chartqa"),
        ([row("yes", "yes", "yes", "no", "yes")], "vqa"),
        ([row("yes", "yes", "no")], "exact"),  # too few people for `vqa`
        ([row("red"), row("a cat")], "exact"),
        ([row("Yes"), row("no")], "yes_no"),
        ([row("B", options=("A", "B"))], "choice"),
    ],
)
def test_metrics_are_suggested_by_the_form_of_the_answers(rows, first):
    assert suggest_metrics(rows)[0][0] == first


def test_answers_of_words_and_boxes_get_metrics_for_both():
    names = [name for name, _ in suggest_metrics([row("a cat beside ", boxes=True)])]
    assert names == ["grounding", "caption"]


def test_nothing_is_suggested_for_rows_without_answers():
    assert suggest_metrics([row()]) == []


def test_a_mixed_set_gets_a_suggestion_for_each_kind_of_answer():
    long = row("a brown dog sits on the grass")
    rows = [row(boxes=True)] * 5 + [row("red")] * 3 + [long] * 3 + [row("12")]
    suggested = suggest_metrics(rows)
    names = [name for name, _ in suggested]
    # One number is too few.
    assert names == ["grounding", "click", "exact", "docvqa", "gqa", "caption"]
    assert dict(suggested)["caption"] == "the answers are sentences (3 of 12 rows)"
