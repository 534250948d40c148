import json
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.data.inspection import File, Inspection, Overlap, files_of, inspect
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.data.split import Concat, Subset
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY, QwenTokenizer
from qwenvl_lit.types import Conversation, ImageSource, Turn

PROCESSOR = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=4, image_size=32)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images: two that are alike in content, another one, and one that breaks off."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "again.png")
    Image.effect_noise((40, 40), 90).save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "noise.png").read_bytes()[:700])
    return tmp_path


def asks(image: str, question: str = "What is it?", answer: str = "red", **more) -> dict:
    return {"query": f"<img>{image}</img>{question}", "response": answer, **more}


def rows_of(folder: Path, name: str, *rows: dict | str, **read_options):
    file = folder / f"{name}.jsonl"
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return read_rows(str(file), ReadOptions(**read_options))


def messages(inspection: Inspection, kind: str) -> list[str]:
    return [
        finding.message
        for facts in inspection.sets
        for finding in facts.findings
        if finding.kind == kind
    ]


def test_a_set_is_counted(folder):
    find = asks("noise.png", "Find <ref>it</ref>", "<box>(1,2),(3,4)</box> <box>(5,6),(7,8)</box>")
    rows = rows_of(
        folder,
        "train",
        asks("red.png"),
        find,
        asks("red.png", "Its colour?"),
        {"query": "1 + 1?", "response": "2"},
    )
    [facts] = inspect({"train": rows}, PROCESSOR).sets
    assert (facts.rows, facts.images, facts.boxes, facts.unanswered) == (4, 2, 2, 0)
    expected = [PROCESSOR.length(row) for row in rows]
    assert list(zip(facts.lengths.tolist(), facts.supervised.tolist(), strict=True)) == expected
    assert facts.usable.tolist() == [0, 1, 2, 3]
    assert facts.files == (File(path=folder / "train.jsonl", layout="query", rows=4),)
    assert not facts.findings


def test_all_errors_are_listed_with_file_line_and_row(folder):
    rows = rows_of(
        folder,
        "train",
        asks("nowhere.png"),
        "{not json",
        asks("red.png", id="good"),
        asks("broken.png", id="half"),
        {"query": "no answer", "id": "open"},
        asks("broken.png", "Again?"),
    )
    inspection = inspect({"train": rows}, PROCESSOR)
    [facts] = inspection.sets
    found = messages(inspection, "error")
    assert [message.removeprefix(f"{folder}/train.jsonl:")[:1] for message in found] == list(
        "12456"
    )
    for message, says in zip(
        found,
        ["nowhere.png does not exist", "not JSON", "half", "no answer to learn from", "broken.png"],
        strict=True,
    ):
        assert says in message
    assert [finding.id for finding in facts.findings] == ["", "", "half", "open", "train.jsonl:6"]
    assert facts.usable.tolist() == [2]
    assert facts.affected == {"error": 5, "dropped": 0, "note": 0, "duplicate": 0}
    assert len(inspection.errors) == 5


def test_broken_images_may_be_a_reason_to_leave_rows_out(folder):
    rows = rows_of(folder, "train", asks("broken.png"), asks("red.png"))
    assert (
        len(inspect({"train": rows}, PROCESSOR, max_bad_fraction=0.4).errors) == 1
    )  # one of two is more
    inspection = inspect({"train": rows}, PROCESSOR, max_bad_fraction=0.5)
    assert not inspection.errors
    assert inspection.sets[0].affected["dropped"] == 1
    assert "broken.png" in messages(inspection, "dropped")[0]


def test_a_image_inside_a_row_is_decoded_too(folder):
    whole, broken = ((folder / name).read_bytes() for name in ("red.png", "broken.png"))
    rows = [
        Conversation(
            id=name,
            turns=(
                Turn(role="user", parts=(ImageSource(content), "What?")),
                Turn(role="assistant", parts=("red",)),
            ),
        )
        for name, content in (("whole", whole), ("twice", whole), ("half", broken))
    ]
    inspection = inspect({"train": rows}, PROCESSOR)
    assert inspection.sets[0].images == 1
    [error] = messages(inspection, "error")
    assert "row 'half'" in error


def test_repaired_and_dropped_boxes_are_told_apart(folder):
    objects = [{"caption": "it", "bbox": [30, 2, 90, 10], "bbox_type": "real", "image": 0}]
    row = {
        "query": "Find <ref-object>",
        "response": "<bbox>",
        "images": ["red.png"],
        "objects": objects,
    }
    for kind, policy in (("error", "error"), ("note", "repair"), ("dropped", "drop")):
        inspection = inspect(
            {"train": rows_of(folder, "train", row, asks("red.png"), on_bad_box=policy)}, PROCESSOR
        )
        [facts] = inspection.sets
        assert facts.affected[kind] == 1
        assert "90" in messages(inspection, kind)[0]
        assert f"{folder}/train.jsonl:1" in messages(inspection, kind)[0]
        assert len(facts.usable) == (2 if kind == "note" else 1)


def test_prompts_need_no_answer_and_teach_nothing(folder):
    rows = rows_of(folder, "test", {"query": "<img>red.png</img>What?"})
    [facts] = inspect({"test": rows}, PROCESSOR, prompts=["test"]).sets
    assert facts.unanswered == 1
    assert facts.lengths.tolist() == [PROCESSOR.length(rows[0], prompt=True)[0]]
    assert facts.supervised.tolist() == [0]


def test_the_same_question_about_the_same_image_is_found_in_two_sets_whatever_the_file_is_called(
    folder,
):
    train = rows_of(
        folder, "train", asks("red.png"), asks("noise.png"), {"query": "1 + 1?", "response": "2"}
    )
    other = asks("again.png", "Another question?")
    test = rows_of(
        folder,
        "test",
        other,
        asks("again.png", answer="a square", id="copy"),
        {"query": "1 + 1?", "response": "two"},
    )
    alone = rows_of(folder, "alone", {"query": "Who?", "response": "me"})
    inspection = inspect({"train": train, "test": test, "alone": alone}, PROCESSOR)
    assert inspection.overlaps == (Overlap(first="train", second="test", rows=2, images=1),)
    first, second = messages(inspection, "duplicate")
    assert first == (
        f"{folder}/test.jsonl:2: row 'copy': asks the same of the same images as {folder}/train.jsonl:1 ('train.jsonl:1') in train"
    )
    assert second.startswith(f"{folder}/test.jsonl:3: ")
    assert not inspection.errors
    assert [len(facts.usable) for facts in inspection.sets] == [3, 3, 1]


def test_several_processes_find_the_same(folder):
    rows = rows_of(
        folder,
        "train",
        *[asks("red.png", f"{n}?") if n % 50 else asks("broken.png") for n in range(600)],
    )
    here, there = (
        inspect({"train": rows}, PROCESSOR, workers=workers).sets[0] for workers in (1, 2)
    )
    assert here.findings == there.findings
    assert len(here.findings) == 12
    assert here.lengths.tolist() == there.lengths.tolist()


def test_progress_is_told_for_rows_and_images(folder):
    told = []
    rows = rows_of(folder, "train", asks("red.png"), asks("noise.png"), asks("red.png"))
    inspect({"train": rows}, PROCESSOR, progress=lambda *what: told.append(what))
    assert ("train: rows", 3, 3) in told
    assert ("images", 2, 2) in told


def test_files_are_found_below_joined_and_chosen_rows(folder):
    a, b = (
        rows_of(folder, "a", asks("red.png")),
        rows_of(folder, "b", {"image": "red.png", "question": "What?", "answer": "x"}),
    )
    files = list(files_of(Concat([Subset(Concat([a, b]), [1]), a])))
    assert [(file.path.name, file.rows) for file in files] == [("a.jsonl", 1), ("b.jsonl", 1)]
    assert files[0].layout == "query"
