"""Analysed scores, and the page that shows them."""

import json
import re

import numpy as np
import pytest
from html_tags import EVIL, Tags
from PIL import Image
from toy_task import conversation, grounded

from qwenvl_lit.metrics.boxes import MeanIoU
from qwenvl_lit.metrics.captions import Bleu
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.reports.scores import (
    bootstrap,
    compare,
    extremes,
    group_predictions,
    ious,
    read_answer_texts,
    read_predictions,
    score_set,
    sorted_groups,
)
from qwenvl_lit.reports.scores_page import EarlierRun, ScoreReport, write_report
from qwenvl_lit.runs.predictions import config_beside, predictions_file
from qwenvl_lit.types import (
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Point,
    Prediction,
    Turn,
)

WHOLE_IMAGE = grounded("it", 0, 0, 64, 64)
LEFT_HALF = grounded("it", 0, 0, 32, 64)


def predicted(
    index: int, text: str, *, answer=("yes",), parts=None, columns=None, images=1
) -> Prediction:
    row = conversation(index, answer=answer)
    question = Turn(role="user", parts=(*[row.images[0]] * images, "What?"))
    row = Conversation(
        id=row.id, index=index, turns=(question, row.turns[1]), columns=columns or {}
    )
    reference = "".join(part if isinstance(part, str) else part.label for part in answer)
    return Prediction(conversation=row, text=text, parts=parts or (text,), reference=reference)


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    mean = bootstrap(np.array([1.0] * 60 + [0.0] * 40 + [np.nan] * 7))
    assert (mean.value, mean.rows) == (0.6, 100)
    # 0.6 -+ 1.96 * sqrt(0.24 / 100)
    assert mean.low == pytest.approx(0.504, abs=0.015)
    assert mean.high == pytest.approx(0.696, abs=0.015)
    assert bootstrap(np.array([0.25] * 9))[:3] == (0.25, 0.25, 0.25)
    assert bootstrap(np.array([np.nan])).rows == 0


def test_scores_are_those_of_the_metric():
    # The last two predictions are of one row.
    rows = [predicted(0, "yes"), predicted(1, "no"), predicted(2, "yes"), predicted(2, "no")]
    scored = score_set("mine", rows, {"exact": ExactMatch(), "iou": MeanIoU()}, rows=5)
    assert scored.totals == {"exact": pytest.approx(1 / 3)}, "no row has a box"
    assert scored.scores["exact"].tolist()[:2] == [1, 0]
    assert np.isnan(scored.scores["exact"][2])
    assert scored.unanswered == 1
    assert scored.mean("exact").rows == 3


def test_a_score_of_the_whole_set_has_no_interval():
    rows = [
        predicted(0, "a b c d e", answer=("a b c d e",)),
        predicted(1, "a b", answer=("x y z",)),
    ]
    scored = score_set("mine", rows, {"bleu": Bleu(1), "exact": ExactMatch()})
    assert not scored.is_mean("bleu")
    assert np.isnan(scored.mean("bleu").low)
    assert scored.mean("bleu").value == scored.totals["bleu"]
    assert scored.is_mean("exact")


def test_groupings_tell_rows_apart_without_naming_each_one():
    rows = [
        predicted(0, "yes", columns={"task": "a", "name": "0"}),
        predicted(
            1, "yes", columns={"task": "b", "name": "1"}, answer=("one two three",), images=2
        ),
        predicted(2, "yes", columns={"task": "b", "name": "2"}, answer=(LEFT_HALF,)),
    ]
    small_box = (grounded("it", 0, 0, 2, 2),)
    for index in range(3, 15):
        columns = {"task": "a", "name": str(index)}
        rows.append(predicted(index, "yes", columns=columns, answer=small_box))
    found = group_predictions(rows)
    assert set(found) == {"task", "images", "words of the expected answer", "box, % of the image"}
    assert found["task"].tolist()[:4] == ["a", "b", "b", "a"]
    assert found["words of the expected answer"].tolist()[:3] == ["1", "2–3", ""]
    assert found["box, % of the image"].tolist()[2:4] == ["50 and more", "0–1"]


def test_groups_are_sorted_by_size_and_then_by_name():
    intervals = ["16 and more", "2–3", "1", "", "8–15"]
    assert sorted_groups(intervals) == ["1", "2–3", "8–15", "16 and more"]
    assert sorted_groups(["b", "", "a"]) == ["a", "b"]
    digits = ["²", "10", "٣", "1.5", "2", "1.2.3", "9" * 400, "2nd"]  # "²".isdigit() is true
    assert sorted_groups(digits) == ["1.5", "2", "10", "9" * 400, "1.2.3", "2nd", "²", "٣"]


def test_the_worst_and_the_best_answers_are_distinct():
    rows = [
        predicted(0, "b", answer=(WHOLE_IMAGE,), parts=(LEFT_HALF,)),
        predicted(1, "b", answer=(WHOLE_IMAGE,), parts=(WHOLE_IMAGE,)),
        predicted(2, "b", answer=(WHOLE_IMAGE,)),
        predicted(3, "b"),
    ]
    click = GroundedObject(boxes=(Point(x=9, y=9),))
    clicked = predicted(4, "b", answer=(WHOLE_IMAGE,), parts=(click,))  # has no overlap
    assert ious([*rows, clicked]).tolist() == [0.5, 1, 0]
    scored = score_set("mine", rows, {"iou": MeanIoU()})
    assert extremes(scored, 1) == ([2], [1])
    assert extremes(scored, 9) == ([2, 0], [1])


def test_two_runs_are_compared_row_by_row():
    rows_before = [predicted(k, "yes" if k < 4 else "no") for k in range(9)]
    rows_now = [predicted(k, "yes" if k > 1 else "no") for k in range(1, 10)]
    before = score_set("mine", rows_before, {"exact": ExactMatch()})
    now = score_set("mine", rows_now, {"exact": ExactMatch()})
    differences, changed = compare(before, now)
    exact = differences["exact"]
    assert exact.before == pytest.approx(3 / 8)
    assert exact.now == pytest.approx(7 / 8)
    assert exact.change.value == pytest.approx(4 / 8)
    assert (exact.better, exact.worse, exact.change.rows) == (5, 1, 8)
    changes = {row.now.conversation.index: row.by for row in changed}
    assert changes == {1: -1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}
    assert len(changed) == 6
    differences, changed = compare(now, now)
    assert differences["exact"].change[:3] == (0, 0, 0)
    assert changed == []


def test_scores_of_a_whole_set_are_compared_as_they_are_computed():
    answers = ("a b c d e f", "a b c d", "q", "a b")
    expected = ("a b c d e f", "a b c x", "u v w", "a b")
    rows_before = [predicted(k, answers[k], answer=(expected[k],)) for k in range(3)]
    rows_now = [predicted(k, expected[k], answer=(expected[k],)) for k in range(4)]
    before = score_set("mine", rows_before, {"bleu": Bleu(2)})
    now = score_set("mine", rows_now, {"bleu": Bleu(2)})
    bleu = compare(before, now)[0]["bleu"]
    assert bleu.before == pytest.approx(before.totals["bleu"]), "all its rows are common"
    assert bleu.before != pytest.approx(before.scores["bleu"].mean())
    assert bleu.now == pytest.approx(1)
    assert bleu.change.value == pytest.approx(bleu.now - bleu.before)
    assert np.isnan(bleu.change.low)
    assert (bleu.better, bleu.worse, bleu.change.rows) == (2, 0, 3)


class Reader:
    """A processor without markup."""

    def read(self, text, conversation):
        return Prediction(conversation=conversation, text=text, parts=(text,))


def line(set_name: str, index: int, row_id: str, text: str) -> dict:
    return {"set": set_name, "index": index, "id": row_id, "prediction": text}


def write_predictions(folder, *rows):
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_answers_are_matched_with_the_rows_that_were_asked(tmp_path):
    rows = {"mine": [conversation(k) for k in range(3)], "other": []}
    lines = [line("mine", k, f"row {k}", str(k)) for k in (2, 0)]
    found = read_predictions(write_predictions(tmp_path, *lines), rows, Reader())
    assert [(p.text, p.conversation.id) for p in found["mine"]] == [("0", "row 0"), ("2", "row 2")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (line("mine", 1, "row 7", "x"), "row 1 of mine is 'row 7', which is 'row 1' in the data"),
        (line("mine", 5, "row 5", "x"), "row 5 of mine is 'row 5', which does not exist in the"),
        (line("yours", 1, "row 7", "x"), "answers the sets yours, the data has mine, other"),
    ],
)
def test_answers_to_other_rows_are_refused(tmp_path, wrong, message):
    rows = {"mine": [conversation(k) for k in range(3)], "other": []}
    with pytest.raises(DataError, match=message):
        read_predictions(write_predictions(tmp_path, wrong), rows, Reader())


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        "[]",
        '{"set": "a", "index": 1, "id": "x"}',
        '{"set": "a", "index": null, "id": "x", "prediction": ""}',
    ],
)
def test_a_line_that_is_not_a_prediction_is_named(tmp_path, wrong):
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(line("a", 0, "x", "")) + "\n" + wrong + "\n")
    with pytest.raises(DataError, match=r"some\.jsonl:2: (expected \{set, index|not JSON)"):
        read_answer_texts(file)


def test_a_folder_or_a_file_gives_answers_and_their_config(tmp_path):
    with pytest.raises(DataError, match="give a folder that `predict` or `test` wrote"):
        predictions_file(tmp_path)
    file = write_predictions(tmp_path, {})
    assert predictions_file(tmp_path) == predictions_file(file) == file
    assert config_beside(str(tmp_path)) is None
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("data: {root: '${paths.cache}'}\n")
    assert config_beside(str(file)) == {"data": {"root": "${paths.cache}"}}


@pytest.fixture
def page(tmp_path) -> str:
    deleted = ImageSource(tmp_path / "gone.png")
    row = Conversation(
        id="gone", index=9, turns=(Turn(role="user", parts=(deleted, EVIL)),), references=("x",)
    )
    rows = [predicted(k, "yes" if k % 3 else EVIL, columns={"task": "ab"[k % 2]}) for k in range(8)]
    rows.append(predicted(8, "b", answer=(WHOLE_IMAGE,), parts=(LEFT_HALF,)))
    rows.append(Prediction(conversation=row, text="y", parts=("y",)))
    metrics = {"exact": ExactMatch(), "iou": MeanIoU()}
    before = score_set(EVIL, [predicted(k, "no") for k in range(8)], metrics)
    benchmark = {"benchmark": "refcoco/val", "metric": "iou", "score": "51.00"}
    report = ScoreReport(
        title="Scores <of> it",
        sets=[score_set(EVIL, rows, metrics, rows=12)],
        published=[{**benchmark, "difference": "-1.00"}],
        notes=["the model was trained on these images"],
        earlier=[
            EarlierRun(name="the <first>", sets={EVIL: before}),
            EarlierRun(name="another", sets={}),
        ],
    )
    write_report(report, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_scores_groups_boxes_changes_and_examples(page):
    text = Tags(page).text
    for heading in (
        "Benchmarks",
        "Scores",
        "Against the <first>",
        "Better now",
        "exact by group",
        "Overlap of boxes",
        "Worst answers",
    ):
        assert heading in text
    assert "the model was trained on these images" in text
    assert "2 rows of" in text, "rows without an answer"
    assert "The two runs have no rows in common" in text
    assert re.search(r'<td class="text">task</td><td class="text">b</td><td>0\.750</td>', page)
    assert "gone.png does not exist" in text
    assert page.count("data:image/jpeg;base64,") >= 8
    assert page.count("<svg") == 1
    assert '<p class="labels predicted">' in page
    assert '<p class="labels expected">' in page


def test_equal_scores_are_neither_the_worst_nor_the_best(tmp_path):
    rows = [predicted(k, "no") for k in range(8)]
    sets = [score_set("mine", rows, {"exact": ExactMatch()})]
    write_report(ScoreReport(title="Scores", sets=sets), tmp_path / "report.html")
    text = Tags((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Some answers (all have the same score)" in text
    assert "Worst answers" not in text
    assert "Best answers" not in text


def test_the_page_is_well_formed_and_complete_and_has_no_markup_from_the_data(page):
    tags = Tags(page)
    assert not tags.names() & {"script", "link", "iframe"}
    assert not [name for name in tags.attribute_names() if name.startswith("on")]
    sources = [attributes["src"] for tag, attributes in tags.tags if tag == "img"]
    assert {source.split(":")[0] for source in sources} == {"data"}
    for tag in ("table", "tr", "td", "section", "div", "pre", "figure", "svg"):
        opened = page.count(f"<{tag}>") + page.count(f"<{tag} ")
        assert opened == page.count(f"</{tag}>"), tag
    assert "<script>alert(1)</script>" in tags.text


def test_the_page_shows_prompts_as_the_model_gets_them(tmp_path):
    processor = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=16, image_size=32)
    image = ImageSource(Image.new("RGB", (8, 8)))
    gone = ImageSource(tmp_path / "gone.png")
    rows = []
    for index, source in enumerate((image, gone)):
        question = Turn(role="user", parts=(source, "What?"))
        row = Conversation(id=str(index), index=index, turns=(question,), references=("a",))
        rows.append(Prediction(conversation=row, text="b", parts=("b",)))
    scored = score_set("test", rows, {"exact": ExactMatch()})
    file = tmp_path / "report.html"
    write_report(ScoreReport(title="t", sets=[scored], processor=processor), file)
    text = Tags(file.read_text(encoding="utf-8")).text
    assert "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" in text
    assert "Picture 1: <img><imgpad> x 16 </img>\nWhat?<|im_end|>\n<|im_start|>assistant\n" in text
    assert f"<img>{tmp_path}/gone.png</img>What?" in text, "an image that cannot be encoded again"
