"""Scores as numbers, and as a page."""

import json
import re

import numpy as np
import pytest
from html_tags import EVIL, Tags
from qwenvl_lit.metrics.suggest import suggested_metrics
from toy_task import conversation, grounded

from qwenvl_lit.metrics.boxes import MeanIoU
from qwenvl_lit.metrics.captions import Bleu
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.reports.scores import (
    answers,
    bootstrap,
    compare,
    extremes,
    groups,
    in_order,
    ious,
    read_predictions,
    score,
)
from qwenvl_lit.reports.scores_page import Earlier, Report, write_report
from qwenvl_lit.runs.predictions import config_beside, predictions_file
from qwenvl_lit.types import Conversation, DataError, ImageSource, Prediction, Turn


def predicted(
    index: int, text: str, *, answer=("yes",), parts=None, columns=None, images=1
) -> Prediction:
    row = conversation(index, answer=answer)
    turns = (Turn(role="user", parts=(*[row.images[0]] * images, "What?")), row.turns[1])
    row = Conversation(id=row.id, index=index, turns=turns, columns=columns or {})
    reference = "".join(part if isinstance(part, str) else part.label for part in answer)
    return Prediction(conversation=row, text=text, parts=parts or (text,), reference=reference)


def test_the_interval_of_a_mean_is_that_of_the_binomial_distribution():
    mean = bootstrap(np.array([1.0] * 60 + [0.0] * 40 + [np.nan] * 7))
    assert (mean.value, mean.rows) == (0.6, 100)
    assert (mean.low, mean.high) == (
        pytest.approx(0.504, abs=0.015),
        pytest.approx(0.696, abs=0.015),
    )  # 0.6 -+ 1.96 * sqrt(0.24 / 100)
    assert bootstrap(np.array([0.25] * 9))[:3] == (0.25, 0.25, 0.25)
    assert bootstrap(np.array([np.nan])).rows == 0


def test_rows_are_scored_as_the_metric_does():
    rows = [
        predicted(0, "yes"),
        predicted(1, "no"),
        predicted(2, "yes"),
        predicted(2, "no"),
    ]  # the last two are one row
    found = score("mine", rows, {"exact": ExactMatch(), "iou": MeanIoU()}, rows=5)
    assert found.totals == {"exact": pytest.approx(1 / 3)}, "no row has a box: nothing to say"
    assert found.scores["exact"].tolist()[:2] == [1, 0]
    assert np.isnan(found.scores["exact"][2])
    assert found.unanswered == 1
    assert found.mean("exact").rows == 3


def test_a_score_of_all_rows_together_has_no_interval():
    rows = [
        predicted(0, "a b c d e", answer=("a b c d e",)),
        predicted(1, "a b", answer=("x y z",)),
    ]
    found = score("mine", rows, {"bleu": Bleu(1), "exact": ExactMatch()})
    assert not found.is_mean("bleu")
    assert np.isnan(found.mean("bleu").low)
    assert found.mean("bleu").value == found.totals["bleu"]
    assert found.is_mean("exact")


def test_groups_are_what_tells_rows_apart():
    box = grounded("it", 0, 0, 32, 64)  # half of the image
    rows = [
        predicted(0, "yes", columns={"task": "a", "name": "0"}),
        predicted(
            1, "yes", columns={"task": "b", "name": "1"}, answer=("one two three",), images=2
        ),
        predicted(2, "yes", columns={"task": "b", "name": "2"}, answer=(box,)),
        *(
            predicted(
                3 + k,
                "yes",
                columns={"task": "a", "name": str(3 + k)},
                answer=(grounded("it", 0, 0, 2, 2),),
            )
            for k in range(12)
        ),
    ]
    found = groups(rows)
    assert set(found) == {
        "task",
        "images",
        "words of the expected answer",
        "box, % of the image",
    }, "a name for each row groups nothing"
    assert found["task"].tolist()[:4] == ["a", "b", "b", "a"]
    assert found["words of the expected answer"].tolist()[:3] == ["1", "2–3", ""]
    assert found["box, % of the image"].tolist()[2:4] == ["50 and more", "0–1"]
    assert in_order(["16 and more", "2–3", "1", "", "8–15"]) == ["1", "2–3", "8–15", "16 and more"]
    assert in_order(["b", "", "a"]) == ["a", "b"]


def test_boxes_worst_and_best():
    half, answer = grounded("it", 0, 0, 32, 64), (grounded("it", 0, 0, 64, 64),)
    rows = [
        predicted(0, "b", answer=answer, parts=(half,)),
        predicted(1, "b", answer=answer, parts=answer),
        predicted(2, "b", answer=answer),
        predicted(3, "b"),
    ]
    assert ious(rows).tolist() == [0.5, 1, 0]
    found = score("mine", rows, {"iou": MeanIoU()})
    assert extremes(found, 1) == ([2], [1])
    assert extremes(found, 9) == ([2, 0], [1]), "each answer once"


def test_two_runs_are_compared_row_by_row():
    before = score(
        "mine", [predicted(k, "yes" if k < 4 else "no") for k in range(9)], {"exact": ExactMatch()}
    )
    now = score(
        "mine",
        [predicted(k, "yes" if k > 1 else "no") for k in range(1, 10)],
        {"exact": ExactMatch()},
    )
    found, changed = compare(before, now)
    assert found["exact"].before == pytest.approx(3 / 8)
    assert found["exact"].now == pytest.approx(7 / 8)
    assert found["exact"].change.value == pytest.approx(4 / 8)
    assert (found["exact"].better, found["exact"].worse, found["exact"].change.rows) == (5, 1, 8)
    assert sorted((row.now.conversation.index, row.by) for row in changed) == [
        (1, -1),
        *((k, 1) for k in range(4, 9)),
    ]
    same, nothing = compare(now, now)
    assert same["exact"].change[:3] == (0, 0, 0)
    assert nothing == []


class Reader:
    """A processor without markup."""

    def read(self, text, conversation):
        return Prediction(conversation=conversation, text=text, parts=(text,))


def write(folder, *rows):
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_answers_are_those_to_the_rows_they_were_given_to(tmp_path):
    rows = {"mine": [conversation(k) for k in range(3)], "other": []}
    file = write(
        tmp_path,
        *({"set": "mine", "index": k, "id": f"row {k}", "prediction": str(k)} for k in (2, 0)),
    )
    found = answers(file, rows, Reader())
    assert [(p.text, p.conversation.id) for p in found["mine"]] == [("0", "row 0"), ("2", "row 2")]
    wrong = write(tmp_path, {"set": "mine", "index": 1, "id": "row 7", "prediction": "x"})
    with pytest.raises(DataError, match="row 1 of mine is 'row 7', which is 'row 1' in the data"):
        answers(wrong, rows, Reader())
    with pytest.raises(DataError, match="does not exist in the data"):
        answers(
            write(tmp_path, {"set": "mine", "index": 5, "id": "row 5", "prediction": "x"}),
            rows,
            Reader(),
        )
    with pytest.raises(DataError, match="answers the sets yours, the data has mine, other"):
        answers(
            write(tmp_path, {"set": "yours", "index": 1, "id": "row 7", "prediction": "x"}),
            rows,
            Reader(),
        )


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"set": "a", "index": 1, "id": "x"}',
        '{"set": "a", "index": null, "id": "x", "prediction": ""}',
    ],
)
def test_a_line_that_is_no_prediction_is_named(tmp_path, line):
    file = tmp_path / "some.jsonl"
    file.write_text('{"set": "a", "index": 0, "id": "x", "prediction": ""}\n' + line + "\n")
    with pytest.raises(DataError, match=r"some\.jsonl:2: expected \{set, index, id, prediction\}"):
        read_predictions(file)


def test_a_folder_or_a_file_gives_answers_and_their_config(tmp_path):
    with pytest.raises(DataError, match="give a folder that `predict` or `test` wrote"):
        predictions_file(tmp_path)
    file = write(tmp_path, {})
    assert predictions_file(tmp_path) == predictions_file(file) == file
    assert config_beside(str(tmp_path)) is None
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("data: {root: '${paths.cache}'}\n")
    assert config_beside(str(file)) == {"data": {"root": "${paths.cache}"}}


def row(*answers: str, boxes=False, options=()) -> Conversation:
    turns = [Turn(role="user", parts=("?",))]
    if boxes or answers:
        turns.append(
            Turn(role="assistant", parts=(grounded("it", 0, 0, 2, 2),) if boxes else answers[:1])
        )
    return Conversation(
        id="1", turns=tuple(turns), references=answers if len(answers) > 1 else (), options=options
    )


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ([row(boxes=True)] * 3 + [row("yes")], "grounding"),
        ([row("a dog on a lawn in the sun", "a brown dog sits on the grass")], "caption"),
        ([row("a long answer with a good many words")], "caption"),
        ([row("12"), row("3.5%"), row("$1,200"), row("no")], "chartqa"),
        ([row("yes", "yes", "yes", "no", "yes")], "vqa"),
        ([row("yes", "yes", "no")], "exact"),  # too few people to agree
        ([row("red"), row("a cat")], "exact"),
        ([row("B", options=("A", "B"))], "choice"),
    ],
)
def test_metrics_are_proposed_by_the_form_of_the_answers(rows, first):
    assert suggested_metrics(rows)[0][0] == first


def test_nothing_is_proposed_where_nothing_is_expected():
    assert suggested_metrics([row()]) == []


@pytest.fixture
def page(tmp_path) -> str:
    half, answer = grounded("it", 0, 0, 32, 64), (grounded("it", 0, 0, 64, 64),)
    gone = Prediction(
        conversation=Conversation(
            id="gone",
            index=9,
            turns=(Turn(role="user", parts=(ImageSource(tmp_path / "gone.png"), EVIL)),),
            references=("x",),
        ),
        text="y",
        parts=("y",),
    )
    rows = [predicted(k, "yes" if k % 3 else EVIL, columns={"task": "ab"[k % 2]}) for k in range(8)]
    rows += [predicted(8, "b", answer=answer, parts=(half,)), gone]
    metrics = {"exact": ExactMatch(), "iou": MeanIoU()}
    now = score(EVIL, rows, metrics, rows=12)
    before = score(EVIL, [predicted(k, "no") for k in range(8)], metrics)
    report = Report(
        title="Scores <of> it",
        sets=[now],
        published=[
            {"benchmark": "refcoco/val", "metric": "iou", "score": "51.00", "difference": "-1.00"}
        ],
        notes=["the model learned from these images"],
        earlier=[
            Earlier(name="the <first>", sets={EVIL: before}),
            Earlier(name="another", sets={}),
        ],
    )
    write_report(report, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_tells_scores_groups_boxes_changes_and_examples(page):
    tags = Tags(page)
    said = tags.text
    for heading in (
        "Benchmarks",
        "Scores",
        "Against the <first>",
        "Better now",
        "exact by group",
        "Overlap of boxes",
        "Worst answers",
    ):
        assert heading in said
    assert "the model learned from these images" in said
    assert "2 rows of" in said, "that have no answer"
    assert "The two have no rows in common" in said
    assert re.search(r"<td class=text>task</td><td class=text>b</td><td>0\.750</td>", page)
    assert "gone.png does not exist" in said
    assert page.count("data:image/jpeg;base64,") >= 8
    assert page.count("<svg") == 1


def test_the_page_is_well_formed_needs_nothing_else_and_holds_no_markup_of_the_data(page):
    tags = Tags(page)
    assert not [tag for tag, _ in tags.tags if tag in ("script", "link", "iframe")]
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on")]
    assert {attributes["src"].split(":")[0] for tag, attributes in tags.tags if tag == "img"} == {
        "data"
    }
    for tag in ("table", "tr", "td", "section", "div", "pre", "figure", "svg"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>"), tag
    assert "<script>alert(1)</script>" in tags.text
