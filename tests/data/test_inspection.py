import base64
import json
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from tiny_qwen3_vl import KINDS, tiny_processor

from qwenvl_lit.data.inspection import File, Inspection, Overlap, files_of, inspect
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.data.selection import Concat, Subset
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn

PROCESSOR = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=4, image_size=32)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Makes images: two with equal content, another one, and a truncated one."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "again.png")
    Image.effect_noise((40, 40), 90).save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "noise.png").read_bytes()[:700])
    return tmp_path


def row(image: str, question: str = "What is it?", answer: str = "red", **columns) -> dict:
    return {"query": f"<img>{image}</img>{question}", "response": answer, **columns}


def rows_of(folder: Path, name: str, *rows: dict | str, **read_options):
    file = folder / f"{name}.jsonl"
    lines = (line if isinstance(line, str) else json.dumps(line) for line in rows)
    file.write_text("".join(line + "\n" for line in lines))
    return read_rows(str(file), ReadOptions(**read_options))


def messages(inspection: Inspection, kind: str) -> list[str]:
    return [
        finding.message
        for facts in inspection.sets
        for finding in facts.findings
        if finding.kind == kind
    ]


def test_tokens_images_and_boxes_of_a_set_are_counted(folder):
    two_boxes = row(
        "noise.png", "Find <ref>it</ref>", "<box>(1,2),(3,4)</box> <box>(5,6),(7,8)</box>"
    )
    rows = rows_of(
        folder,
        "train",
        row("red.png"),
        two_boxes,
        row("red.png", "Its colour?"),
        {"query": "1 + 1?", "response": "2"},
    )
    [facts] = inspect({"train": rows}, PROCESSOR).sets
    assert (facts.rows, facts.images, facts.boxes, facts.unanswered) == (4, 2, 2, 0)
    expected = [PROCESSOR.length(conversation)[:2] for conversation in rows]
    assert list(zip(facts.lengths.tolist(), facts.supervised.tolist(), strict=True)) == expected
    assert facts.usable.tolist() == [0, 1, 2, 3]
    assert facts.files == (File(path=folder / "train.jsonl", layout="query", rows=4, used=4),)
    assert not facts.findings


def test_every_error_is_listed_with_file_line_and_row_id(folder):
    rows = rows_of(
        folder,
        "train",
        row("nowhere.png"),
        "{not json",
        row("red.png", id="good"),
        row("broken.png", id="half"),
        {"query": "no answer", "id": "open"},
        row("broken.png", "Again?"),
    )
    inspection = inspect({"train": rows}, PROCESSOR)
    [facts] = inspection.sets
    errors = messages(inspection, "error")
    lines = [message.removeprefix(f"{folder}/train.jsonl:")[:1] for message in errors]
    assert lines == list("12456")
    expected = (
        "nowhere.png does not exist",
        "not JSON",
        "half",
        "no answer to learn from",
        "broken.png",
    )
    for message, part in zip(errors, expected, strict=True):
        assert part in message
    assert [finding.id for finding in facts.findings] == [
        "train.jsonl:1",
        "",
        "half",
        "open",
        "train.jsonl:6",
    ]
    places = [finding.where for finding in facts.findings]
    assert places == [f"{folder}/train.jsonl:{line}" for line in lines]
    assert facts.usable.tolist() == [2]
    assert facts.affected == {"error": 5, "dropped": 0, "note": 0, "image": 0, "duplicate": 0}
    assert len(inspection.errors) == 5


def test_rows_with_broken_images_are_dropped_up_to_max_bad_fraction(folder):
    rows = rows_of(folder, "train", row("broken.png"), row("red.png"))
    # One of the two rows is broken.
    assert len(inspect({"train": rows}, PROCESSOR, max_bad_fraction=0.4).errors) == 1
    inspection = inspect({"train": rows}, PROCESSOR, max_bad_fraction=0.5)
    assert not inspection.errors
    assert inspection.sets[0].affected["dropped"] == 1
    assert "broken.png" in messages(inspection, "dropped")[0]


def test_missing_images_count_as_broken_ones(folder):
    rows = rows_of(folder, "train", row("nowhere.png"), row("broken.png"), row("red.png"))
    [facts] = inspect({"train": rows}, PROCESSOR, max_bad_fraction=0.7).sets
    assert (facts.affected["dropped"], facts.affected["error"], facts.bad_images) == (2, 0, 2)
    inspection = inspect({"train": rows}, PROCESSOR, max_bad_fraction=0.5)
    assert len(inspection.errors) == inspection.sets[0].bad_images == 2
    assert not any("on_bad_image" in finding.message for _, finding in inspection.errors)
    as_errors = inspect({"train": rows}, PROCESSOR)
    assert all("on_bad_image=drop" in finding.message for _, finding in as_errors.errors)


def test_a_question_that_is_longer_than_a_training_row_may_be_is_noted(folder):
    processor = QwenVLProcessor(PROCESSOR.tokenizer, tokens_per_image=4, max_length=60)
    rows = rows_of(folder, "test", {"query": "a" * 300}, {"query": "a"})
    inspection = inspect({"test": rows}, processor, prompts=["test"])
    [note] = messages(inspection, "note")
    assert "tokens, more than model.max_length=60 allows in training" in note
    assert len(inspection.sets[0].usable) == 2


def test_rows_without_an_answer_and_with_an_empty_one_are_told_apart(folder):
    rows = rows_of(
        folder,
        "train",
        {"query": "open"},
        row("red.png", answer=" "),
        row("red.png", "1", answer=""),
        row("red.png", "2"),
        "{not json",
    )
    [facts] = inspect({"train": rows}, PROCESSOR).sets
    assert (facts.unanswered, facts.empty_answers, len(facts.usable)) == (1, 2, 3)


def test_prompts_without_an_answer_are_named_if_others_have_one(folder):
    unanswered = {"query": "open", "id": "x"}
    rows = rows_of(folder, "test", row("red.png"), unanswered)
    inspection = inspect({"test": rows}, PROCESSOR, prompts=["test"])
    [note] = messages(inspection, "note")
    assert note.startswith(f"{folder}/test.jsonl:2: row 'x': the row has no answer, and metrics")
    rows = rows_of(folder, "open", unanswered)
    assert not inspect({"test": rows}, PROCESSOR, prompts=["test"]).sets[0].findings


class Sized(QwenVLProcessor):
    """A processor that reads the sizes of images: an image has a token for 20 pixels of width."""

    def length(self, conversation, *, prompt=False):
        tokens = sum(image.size[0] // 20 for image in conversation.images)
        length = super().length(conversation, prompt=prompt)
        return length._replace(tokens=length.tokens + tokens, image_tokens=tokens)


@pytest.fixture
def sized() -> Sized:
    return Sized(QwenTokenizer(TINY_VOCABULARY), tokens_per_image=4, image_size=32)


def test_an_image_whose_size_cannot_be_read_is_reported_once(folder, sized):
    (folder / "text.png").write_text("no image")
    coded = base64.b64encode(b"no image").decode()
    images = ["text.png", "nowhere.png", f"data:image/png;base64,{coded}", "red.png"]
    rows = rows_of(folder, "train", *map(row, images))
    for prompts in ((), ("train",)):
        inspection = inspect({"train": rows}, sized, prompts=prompts)
        [facts] = inspection.sets
        assert [finding.index for finding in facts.findings] == [0, 1, 2]
        assert len(messages(inspection, "error")) == 3
        assert facts.usable.tolist() == [3]
        dropped = inspect({"train": rows}, sized, prompts=prompts, max_bad_fraction=0.8)
        assert len(messages(dropped, "dropped")) == 3


def test_a_broken_image_is_named_once_in_its_message(folder):
    rows = rows_of(folder, "train", row("broken.png", id="half"))
    [error] = messages(inspect({"train": rows}, PROCESSOR), "error")
    location = f"{folder}/train.jsonl:1: row 'half': image {folder}/broken.png cannot be read"
    assert error.startswith(location)


def test_images_inside_rows_are_decoded_too(folder):
    def conversation(row_id: str, file: str) -> Conversation:
        image = ImageSource((folder / file).read_bytes())
        question = Turn(role="user", parts=(image, "What?"))
        answer = Turn(role="assistant", parts=("red",))
        return Conversation(id=row_id, turns=(question, answer))

    rows = [
        conversation("whole", "red.png"),
        conversation("twice", "red.png"),
        conversation("half", "broken.png"),
    ]
    inspection = inspect({"train": rows}, PROCESSOR)
    assert inspection.sets[0].images == 1
    [error] = messages(inspection, "error")
    assert "row 'half'" in error


def test_on_bad_box_decides_the_kind_of_finding(folder):
    objects = [{"caption": "it", "bbox": [30, 2, 90, 10], "bbox_type": "real", "image": 0}]
    wide_box = {
        "query": "Find <ref-object>",
        "response": "<bbox>",
        "images": ["red.png"],
        "objects": objects,
    }
    for kind, policy in (("error", "error"), ("note", "repair"), ("dropped", "drop")):
        rows = rows_of(folder, "train", wide_box, row("red.png"), on_bad_box=policy)
        inspection = inspect({"train": rows}, PROCESSOR)
        [facts] = inspection.sets
        assert facts.affected[kind] == 1
        assert "90" in messages(inspection, kind)[0]
        assert f"{folder}/train.jsonl:1" in messages(inspection, kind)[0]
        assert len(facts.usable) == (2 if kind == "note" else 1)


def test_prompts_need_no_answer_and_have_no_supervised_tokens(folder):
    rows = rows_of(folder, "test", {"query": "<img>red.png</img>What?"})
    [facts] = inspect({"test": rows}, PROCESSOR, prompts=["test"]).sets
    assert facts.unanswered == 1
    assert facts.lengths.tolist() == [PROCESSOR.length(rows[0], prompt=True)[0]]
    assert facts.supervised.tolist() == [0]


def test_questions_that_two_sets_share_are_found_by_the_content_of_their_images(folder):
    text_only = {"query": "1 + 1?", "response": "2"}
    train = rows_of(folder, "train", row("red.png"), row("noise.png"), text_only)
    test = rows_of(
        folder,
        "test",
        row("again.png", "Another question?"),
        row("again.png", answer="a square", id="copy"),
        {"query": "1 + 1?", "response": "two"},
    )
    alone = rows_of(folder, "alone", {"query": "Who?", "response": "me"})
    inspection = inspect({"train": train, "test": test, "alone": alone}, PROCESSOR)
    assert inspection.overlaps == (Overlap(first="train", second="test", rows=2, images=1),)
    first, second = messages(inspection, "duplicate")
    assert first == (
        f"{folder}/test.jsonl:2: row 'copy': asks the same question about the same images as "
        f"{folder}/train.jsonl:1 ('train.jsonl:1') in train"
    )
    assert second.startswith(f"{folder}/test.jsonl:3: ")
    assert not inspection.errors
    assert [len(facts.usable) for facts in inspection.sets] == [3, 3, 1]


def test_the_number_of_processes_does_not_change_the_result(folder):
    lines = [row("red.png", f"{n}?") if n % 50 else row("broken.png") for n in range(600)]
    rows = rows_of(folder, "train", *lines)
    [one] = inspect({"train": rows}, PROCESSOR, workers=1).sets
    [two] = inspect({"train": rows}, PROCESSOR, workers=2).sets
    assert one.findings == two.findings
    assert len(one.findings) == 12
    assert one.lengths.tolist() == two.lengths.tolist()


def test_progress_is_reported_for_rows_and_images(folder):
    reports = []
    rows = rows_of(folder, "train", row("red.png"), row("noise.png"), row("red.png"))
    inspect({"train": rows}, PROCESSOR, progress=lambda *report: reports.append(report))
    assert ("train: rows", 3, 3) in reports
    assert ("images", 2, 2) in reports


def test_files_are_found_below_subsets_and_concatenations(folder):
    a = rows_of(folder, "a", row("red.png"))
    b = rows_of(folder, "b", {"image": "red.png", "question": "What?", "answer": "x"})
    files = list(files_of(Concat([a, Subset(Concat([a, b]), [1])])))
    assert [(file.path.name, file.rows, file.used) for file in files] == [
        ("a.jsonl", 1, 1),
        ("b.jsonl", 1, 1),
    ]
    assert files[0].layout == "query"


def test_the_rows_that_a_set_uses_of_a_file_are_counted(folder):
    rows = rows_of(folder, "a", *(row("red.png", str(number)) for number in range(5)))
    [facts] = inspect({"train": Subset(rows, [0, 3, 4])}, PROCESSOR).sets
    assert [(file.rows, file.used) for file in facts.files] == [(5, 3)]
    [repeated] = files_of(Subset(rows, [0, 0, 1, 1]))  # distinct rows are counted
    assert repeated.used == 2


def unusual_images(folder: Path) -> None:
    """Makes an image of 16 bits, and one that viewers rotate."""
    Image.new("I;16", (4, 4), 3000).save(folder / "deep.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(folder / "rotated.jpg", exif=exif)


def test_unusual_images_are_noted_once_with_the_keys_that_change_them(folder):
    unusual_images(folder)
    names = ("deep.png", "deep.png", "rotated.jpg", "rotated.jpg", "red.png")
    inspection = inspect({"train": rows_of(folder, "train", *map(row, names))}, PROCESSOR)
    deep, turned = messages(inspection, "image")
    assert deep.startswith(f"{folder}/train.jsonl:1: row 'train.jsonl:1': image {folder}/deep.png ")
    assert "more than 8 bits (mode I;16)" in deep
    assert "data.on_deep_image=scale" in deep
    assert f"train.jsonl:3': image {folder}/rotated.jpg is shown rotated by viewers" in turned
    assert "(EXIF orientation 6)" in turned
    assert "data.exif=apply" in turned
    assert not inspection.errors
    assert inspection.sets[0].usable.tolist() == [0, 1, 2, 3, 4]
    options = {"exif": "apply", "on_deep_image": "scale"}
    changed = rows_of(folder, "train", *map(row, names), **options)
    assert messages(inspect({"train": changed}, PROCESSOR), "image") == []


def test_unusual_images_inside_rows_are_noted_too(folder):
    unusual_images(folder)
    data = base64.b64encode((folder / "deep.png").read_bytes()).decode()
    rows = rows_of(folder, "train", row(f"data:image/png;base64,{data}"))
    [note] = messages(inspect({"train": rows}, PROCESSOR), "image")
    assert "data.on_deep_image=scale" in note


@pytest.mark.parametrize("on_bad_box", ["error", "drop"])
def test_a_box_outside_of_a_rotated_image_names_the_rotation(folder, on_bad_box):
    unusual_images(folder)
    box = {"caption": "it", "bbox": [0, 0, 15, 35], "bbox_type": "real"}
    boxed = row("rotated.jpg", "Find <ref-object>", "<bbox>", objects=[box])
    rows = rows_of(folder, "train", boxed, on_bad_box=on_bad_box)
    with pytest.raises(DataError, match=r"EXIF orientation 6.*data.exif=apply rotates it"):
        rows[0]
    [upright] = rows_of(folder, "train", boxed, exif="apply")
    assert upright.images[0].size == (20, 40)


def notes(folder, *rows: dict) -> list[str]:
    """Notes about the rows, without file, line and id."""
    inspection = inspect({"train": rows_of(folder, "train", *rows)}, PROCESSOR)
    assert not inspection.errors
    return [message.split(": ", 2)[2] for message in messages(inspection, "note")]


def test_empty_and_blank_answers_are_counted(folder):
    assert notes(
        folder,
        row("red.png", answer=""),
        row("red.png", "1", answer=" \n"),
        row("red.png", "2", history=[["a", ""], ["b", "c"]]),
        row("red.png", "3", answer="<ref>it</ref><box>(1,2),(3,4)</box>"),
    ) == [
        "the answer is empty: only its end-of-turn token is supervised",
        "the answer in turn 2 is blank",
        "the answer in turn 2 is empty: nothing of it is supervised",
    ]


def test_rows_with_equal_ids_are_counted(folder):
    repeated = notes(
        folder,
        row("red.png", id="a"),
        row("red.png", "1", id="b"),
        row("red.png", "2", id="a"),
        row("red.png", "3"),
        row("red.png", "4"),
        row("red.png", "5", id="a"),
    )
    same = f"has the same id as {folder}/train.jsonl:1; an id tells rows apart in predictions and"
    assert repeated == [f"{same} scores"] * 2


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("<|object_ref_start|>it<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>", "Qwen2-VL"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "it"}]', "Qwen2.5-VL and Qwen3-VL"),
        ("It is at [0.1, 0.25, .5, 1.0].", "LLaVA or Shikra"),
        ("Click (0.17,0.06)", "SeeClick"),
        ("(0.17,0.06,0.33,0.20)", "SeeClick"),
        ("[10,20,300,400]", "lists of whole numbers"),
        ("<loc0001><loc0002><loc0003><loc0004> it", "PaliGemma"),
    ],
)
def test_boxes_in_the_markup_of_other_models_are_counted_by_form(folder, answer, form):
    [note] = notes(folder, row("red.png", answer=answer), row("red.png", "1", answer="[1, 2] <x>"))
    assert note.startswith(f"text has boxes in the form of {form} (")
    assert note.endswith(
        "convert them to <box>(x1,y1),(x2,y2)</box> on the grid 0..999, or to `objects`"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_in_the_markup_of_the_model_itself_are_not_noted(folder, kind):
    own = row("red.png", answer='```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "it"}]\n```')
    other = row("red.png", "1", answer="<loc0001><loc0002><loc0003><loc0004> it")
    rows = rows_of(folder, "train", own, other)
    [note] = messages(inspect({"train": rows}, tiny_processor(kind)), "note")
    assert "in the form of PaliGemma" in note
