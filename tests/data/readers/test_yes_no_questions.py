"""POPE's and MME's files in their published layouts, read as rows."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwenvl_lit.data.readers.mme import read_mme
from qwenvl_lit.data.readers.pope import read_pope
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.types import BadImage, DataError

# Two lines of the published coco_pope_random.json
POPE = (
    '{"question_id": 0, "image": "COCO_val2014_000000548882.jpg", "image_id": 548882, '
    '"text": "Is there a dining table in the image?", "label": "yes"}\n'
    '{"question_id": 3, "image": "COCO_val2014_000000548882.jpg", "image_id": 548882, '
    '"text": "Is there a tv in the image?", "label": "no"}\n'
)
# The published OCR/0001.txt, which ends in a blank line
MME = (
    'Is the word in the logo "angie\'s"? Please answer yes or no.\tYes\n'
    'Is the word in the logo "angle\'s"? Please answer yes or no.\tNo\n\n'
)


def image(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(file)
    return file


def text(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def question(row) -> list[str]:
    """The texts of the question and the answer; images are left out."""
    texts = []
    for turn in row.turns:
        texts.append("".join(part for part in turn.parts if isinstance(part, str)))
    return texts


@pytest.fixture
def pope(tmp_path):
    image(tmp_path / "coco/val2014/COCO_val2014_000000548882.jpg")

    def read(content: str = POPE, **options):
        text(tmp_path / "pope/random.json", content)
        options = ReadOptions(root=tmp_path, **options)
        return read_pope("pope/random.json", options, images="coco/val2014")

    return read


def test_questions_of_pope_have_the_prompt_of_short_answers(pope, tmp_path):
    rows = pope()
    assert [row.id for row in rows] == ["0", "3"]
    assert question(rows[0]) == ["Is there a dining table in the image? Answer:", "yes"]
    assert question(rows[1]) == ["Is there a tv in the image? Answer:", "no"]
    assert rows[0].images[0].size == (8, 6)
    assert rows[1].where == f"{tmp_path}/pope/random.json:2"
    assert question(pope(prompt="{image}Q: {question}")[1]) == [
        "Q: Is there a tv in the image?",
        "no",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, r"random\.json:1.*label must be yes or no, got 'maybe'"),
        ({"label": None}, r"random\.json:1.*label must be text, got None"),
        ({"text": 3.5}, "text must be text, got 3.5; .*POPE's rows have question_id, image, text"),
        ({"image": "no.jpg"}, r"random\.json:1.*no\.jpg does not exist"),
    ],
)
def test_a_row_that_is_not_pope_s_is_refused_with_its_line(pope, change, message):
    row = {**json.loads(POPE.splitlines()[0]), **change}
    with pytest.raises(DataError, match=message):
        pope(json.dumps(row))


@pytest.mark.parametrize("folders", [("", ""), ("images", "questions_answers_YN")])
def test_both_layouts_of_mme_give_the_same_rows(tmp_path, folders):
    images, texts = folders
    subtask = tmp_path / "mme/OCR"
    for name in ("0002.png", "0001.jpg"):
        image(subtask / images / name)
        text(subtask / texts / name.replace(name[4:], ".txt"), MME)
    rows = read_mme("mme/OCR", ReadOptions(root=tmp_path))
    assert [row.id for row in rows] == [
        "OCR/0001.jpg/1",
        "OCR/0001.jpg/2",
        "OCR/0002.png/1",
        "OCR/0002.png/2",
    ]
    assert question(rows[1]) == [
        'Is the word in the logo "angle\'s"? Please answer yes or no.',
        "No",
    ]
    assert rows[2].columns == {"image_name": "0002.png"}
    assert rows[3].where.endswith("0002.txt:2")
    assert rows[3].images[0].size == (8, 6)
    assert len(read_mme("mme/OCR#3", ReadOptions(root=tmp_path))) == 3


def mme_rows(folder: Path, images: str = "images") -> list[dict]:
    """The questions of a subtask as rows of lmms-lab/MME, whose ids lack the folder `images`."""
    rows = []
    for file in sorted((folder / images).iterdir()):
        content = {"bytes": file.read_bytes(), "path": file.name}
        for line in MME.splitlines()[:2]:
            question, _, answer = line.partition("\t")
            row = {"question_id": f"{folder.name}/{file.name}", "image": content}
            rows.append({**row, "question": question, "answer": answer, "category": folder.name})
    return rows


def test_questions_of_mme_in_parquet_files_are_those_of_the_folders(tmp_path):
    rows = []
    for subtask in ("OCR", "count"):
        for name in ("0010.png", "0002.png", "a.jpg"):
            image(tmp_path / f"mme/{subtask}/images" / name)
            text(tmp_path / f"mme/{subtask}/questions_answers_YN/{name[:-4]}.txt", MME)
        rows += mme_rows(tmp_path / "mme" / subtask)
    random.Random(0).shuffle(rows)
    rows.sort(key=lambda row: MME.index(row["question"]))  # pairs are apart, and in two files
    pq.write_table(pa.Table.from_pylist(rows[:7]), tmp_path / "test-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[7:]), tmp_path / "test-1.parquet")
    options = ReadOptions(root=tmp_path, cache=tmp_path / "cache")
    for subtask in ("OCR", "count"):
        expected = read_mme(f"mme/{subtask}", options)
        read = read_mme(f"none/{subtask}", options, parquet="test-*.parquet")
        assert [(row.id, question(row), row.columns) for row in read] == [
            (row.id, question(row), row.columns) for row in expected
        ]
        assert [row.images[0]._content() for row in read] == [
            row.images[0].source.read_bytes() for row in expected
        ]
    assert len(read_mme("none/OCR#2", options, parquet="test-*.parquet")) == 2
    with pytest.raises(DataError, match="has no rows of the category 'color'; it has OCR, count"):
        read_mme("none/color", options, parquet="test-*.parquet")
    with pytest.raises(
        DataError, match=r"test-0.parquet \(row \d, row group 1\): the image .* has 1"
    ):
        read_mme("none/OCR", options, parquet="test-0.parquet")


@pytest.mark.parametrize(
    "change", [{"answer": "Perhaps"}, {"category": None}, {"image": None}, {"question_id": 1}]
)
def test_a_row_that_is_not_in_the_format_of_mme_is_named(tmp_path, change):
    row = {"question_id": "OCR/1.png", "question": "Is it?", "answer": "Yes", "category": "OCR"}
    table = pa.Table.from_pylist([{**row, "image": b"1", **change}])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a.parquet \(row 1, row group 1\).*columns of lmms-lab/MME"
    ):
        read_mme("OCR", parquet=str(tmp_path / "a.parquet"))


def test_images_of_mme_may_be_in_a_subfolder_as_those_of_artwork(tmp_path):
    image(tmp_path / "artwork/images/toy_dataset/10002.jpg")
    text(tmp_path / "artwork/questions_answers_YN/10002.txt", MME)
    assert len(read_mme(str(tmp_path / "artwork"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Is it?\tYes\n", r"1\.txt has 1 questions; MME has 2 for each image"),
        ("Is it? Yes\nIs it?\tNo\n", r"1\.txt:1.*expected question<TAB>Yes .*, got 'Is it\? Yes'"),
        ("Is it?\tYes\nIs it?\tPerhaps\n", r"1\.txt:2.*got 'Is it\?\\tPerhaps'"),
        ("\tYes\nIs it?\tNo\n", r"1\.txt:1"),
    ],
)
def test_a_text_file_that_is_not_mme_s_is_refused_with_its_line(tmp_path, content, message):
    image(tmp_path / "OCR/1.jpg")
    text(tmp_path / "OCR/1.txt", content)
    with pytest.raises(DataError, match=message):
        read_mme(str(tmp_path / "OCR"))


def test_what_is_no_folder_of_mme_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file .*nowhere"):
        read_mme(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"a\.txt is a file; give the folder of a subtask"):
        read_mme(str(text(tmp_path / "a.txt", MME)))
    with pytest.raises(DataError, match=r"a\.txt: its image a\.jpg or \.jpeg or \.png is not in"):
        read_mme(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no text files with questions"):
        read_mme(str(tmp_path / "empty"))
    file = text(tmp_path / "latin/1.txt", "")
    file.write_bytes(b"caf\xe9\tYes\n")
    image(tmp_path / "latin/1.jpg")
    with pytest.raises(DataError, match=r"1\.txt is not UTF-8: .* at byte 3"):
        read_mme(str(tmp_path / "latin"))


def test_an_image_of_mme_that_is_no_file_is_refused_with_its_line(tmp_path):
    text(tmp_path / "OCR/1.txt", MME)
    (tmp_path / "OCR/1.jpg").mkdir()
    with pytest.raises(BadImage, match=r"1\.txt:1.*1\.jpg is a folder"):
        read_mme(str(tmp_path / "OCR"))[0]
