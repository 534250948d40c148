import json
import pickle

import pytest
from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.data.readers.vqa import fetch_vqav2, read_answered, read_vqa
from qwenvl_lit.types import BadImage, Conversation, DataError, ImageSource, Turn

IMAGE = "coco/{split}/COCO_{split}_{image_id:012d}.jpg"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def annotation(question_id, *answers, most_frequent=None):
    row = {"question_id": question_id, "image_id": 42, "answer_type": "other"}
    row["answers"] = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, 1)
    ]
    return row | ({"multiple_choice_answer": most_frequent} if most_frequent else {})


@pytest.fixture
def root(tmp_path):
    (tmp_path / "coco/val2014").mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(tmp_path / "coco/val2014/COCO_val2014_000000000042.jpg")
    return tmp_path


@pytest.fixture
def vqa(root):
    """Returns a function that writes files in VQA's format and reads them."""

    def write(questions, annotations=None, *, split="val2014", name=QUESTIONS, **options):
        (root / name).write_text(
            json.dumps({"info": {}, "data_subtype": split, "questions": questions})
        )
        if annotations is not None:
            (root / ANNOTATIONS).write_text(
                json.dumps({"data_subtype": split, "annotations": annotations})
            )
        return read_vqa(name, ReadOptions(root=root, **options), image=IMAGE)

    return write


WHERE = {"question_id": 42000, "image_id": 42, "question": "Where is <box>he</box> looking?"}


def test_the_most_frequent_answer_is_supervised_and_all_are_references(root, vqa):
    answers = ("down", "at table", "down", "table")
    rows = vqa([WHERE], [annotation(42000, *answers, most_frequent="down")])
    assert list(rows) == [
        Conversation(
            id="42000",
            turns=(
                Turn(
                    role="user",
                    parts=(
                        ImageSource(root / "coco/val2014/COCO_val2014_000000000042.jpg"),
                        "Where is <box>he</box> looking?",
                        " Answer:",
                    ),
                ),
                Turn(role="assistant", parts=("down",)),
            ),
            references=answers,
        )
    ]
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]
    assert vqa([WHERE], [annotation(42000, "a", "b", "b")])[0].answer.parts == (
        "b",
    )  # as OK-VQA's files have it


def test_the_prompt_can_be_changed(vqa):
    row = vqa([WHERE], [annotation(42000, "down")], prompt="{image}\n{question}")[0]
    assert row.turns[0].parts[1:] == ("\n", "Where is <box>he</box> looking?")


def test_questions_of_a_test_split_have_no_answers(root, vqa):
    (root / "coco/test2015").mkdir()
    Image.new("RGB", (4, 3)).save(root / "coco/test2015/COCO_test2015_000000000042.jpg")
    row = vqa(
        [WHERE], split="test-dev2015", name="v2_OpenEnded_mscoco_test-dev2015_questions.json"
    )[0]
    assert row.answer is None
    assert row.references == ()


def test_questions_without_their_answers_are_an_error(vqa):
    with pytest.raises(
        DataError, match=r"v2_mscoco_val2014_annotations.json cannot be read: No such file"
    ):
        vqa([WHERE])
    with pytest.raises(
        DataError,
        match=rf"{ANNOTATIONS} lacks 1 of the questions of {QUESTIONS}, the first is 42000",
    ):
        vqa([WHERE], [annotation(1, "yes")])


def test_an_error_of_a_missing_image_names_the_question(vqa):
    rows = vqa([WHERE | {"image_id": 43}, WHERE | {"image_id": "x"}], [annotation(42000, "down")])
    with pytest.raises(
        DataError, match=rf"{QUESTIONS}: row '42000': image .*000000000043.jpg does not exist"
    ):
        rows[0]
    with pytest.raises(DataError, match=rf"{QUESTIONS}: row '42000': .*Unknown format code 'd'"):
        rows[1]


@pytest.mark.parametrize("rows", [[1], [{"question_id": 1}], 7])
def test_other_formats_are_refused(vqa, rows):
    with pytest.raises(DataError, match=rf"{QUESTIONS} is not in VQA's format"):
        vqa(rows, [])
    with pytest.raises(DataError, match=rf"{ANNOTATIONS} is not in VQA's format"):
        vqa([WHERE], rows)


def test_a_file_without_questions_is_an_error(vqa):
    with pytest.raises(DataError, match=rf"{QUESTIONS} has no questions"):
        vqa([], [])


def test_answers_are_text(vqa):
    with pytest.raises(DataError, match=rf"{ANNOTATIONS} is not in VQA's format"):
        vqa([WHERE], [annotation(42000, 7)])
    with pytest.raises(DataError, match=rf"{ANNOTATIONS} is not in VQA's format"):
        vqa([WHERE], [annotation(42000)])
    with pytest.raises(DataError, match="'int' object has no attribute 'encode'"):
        vqa([WHERE], [{"question_id": 42000, "answers": ["a", 7], "multiple_choice_answer": "a"}])


# The jsonl files of Qwen-VL's evaluation, one for each split


LINE = {
    "image": "data/coco/val2014/COCO_val2014_000000000042.jpg",
    "question": "What brand?",
    "question_id": 34602,
    "answer": "dakota",
}


@pytest.fixture
def lines(root):
    def write(*rows):
        (root / "textvqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ReadOptions(root=root, path_map={"data": "."})

    return write


def test_a_line_names_its_image_and_its_answer(root, lines):
    (row,) = read_rows("textvqa_val.jsonl", lines(LINE))
    assert row.id == "34602"
    assert row.turns == (
        Turn(
            role="user",
            parts=(
                ImageSource(root / "coco/val2014/COCO_val2014_000000000042.jpg"),
                "What brand? Answer:",
            ),
        ),
        Turn(role="assistant", parts=("dakota",)),
    )
    assert row.references == ("dakota",)


def test_answer_may_be_a_list_of_answers(lines):
    several, none = read_rows(
        "textvqa_val.jsonl",
        lines(LINE | {"answer": ["0.28", "28%", "28%"]}, LINE | {"answer": None}),
    )
    assert several.answer.parts == ("28%",)
    assert several.references == ("0.28", "28%", "28%")
    assert none.answer is None
    with pytest.raises(DataError, match="answers must be text"):
        read_rows("textvqa_val.jsonl", lines(LINE | {"answer": [7]}))[0]


def test_ten_answers_come_from_the_file_beside_it(root, lines):
    read_options = lines(LINE, LINE | {"question_id": 34603})
    (root / "textvqa_val_annotations.json").write_text(
        json.dumps({"annotations": [annotation(34602, "nous les", "dakota")]})
    )
    rows = read_answered("textvqa_val.jsonl", read_options, answers="{stem}_annotations.json")
    assert rows[0].answer.parts == ("dakota",)
    assert rows[0].references == ("nous les", "dakota")
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]
    with pytest.raises(
        DataError,
        match=r"textvqa_val.jsonl:2: row '34603': the question is not in .*textvqa_val_anno",
    ):
        rows[1]
    assert (
        len(read_answered("textvqa_val.jsonl#5", read_options, answers="{stem}_annotations.json"))
        == 5
    )


def test_missing_files_are_listed_with_address_and_size_when_downloads_are_off(tmp_path):
    with pytest.raises(
        DataError, match=r"lacks v2_OpenEnded_mscoco_train2014_questions.json, .*downloads are off"
    ) as error:
        fetch_vqav2(tmp_path, False)
    assert (
        "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Annotations_Train_mscoco.zip (21.7 MB)"
        in str(error.value)
    )


def test_a_question_whose_image_is_missing_is_a_bad_image(root, vqa):
    rows = vqa([WHERE | {"image_id": 43}], [annotation(42000, "down")])
    with pytest.raises(BadImage, match=r"questions\.json: row '42000': .*000043\.jpg does not"):
        rows[0]


@pytest.mark.parametrize("image_id", ["text", None, [1], 1.5])
def test_an_image_id_that_does_not_fit_the_file_name_is_refused(root, vqa, image_id):
    rows = vqa([WHERE | {"image_id": image_id}], [annotation(42000, "down")])
    with pytest.raises(DataError, match=r"row '42000': `image` .* does not fit the image_id"):
        rows[0]
