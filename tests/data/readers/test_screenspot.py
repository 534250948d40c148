import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.screenspot import check_screenspot, read_screenspot
from qwenvl_lit.grounding import to_frame
from qwenvl_lit.types import Box, DataError, GroundedObject, ImageSource

ROWS = [  # as published
    {
        "img_filename": "mobile_1.png",
        "bbox": [49, 1134, 124, 130],
        "instruction": 'open "<ref>settings"',
        "data_type": "icon",
        "data_source": "ios",
    },
    {
        "img_filename": "mobile_1.png",
        "bbox": [0, 0, 1300, 20],  # wider than the screenshot
        "instruction": "see the time",
        "data_type": "text",
        "data_source": "android",
    },
]


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "imgs").mkdir()
    Image.new("RGB", (1170, 2532)).save(tmp_path / "imgs/mobile_1.png")
    (tmp_path / "screenspot_mobile.json").write_text(json.dumps(ROWS))
    return tmp_path / "screenspot_mobile.json"


def rows_of(file: Path, suffix: str = "", **options):
    read_options = ReadOptions(root=file.parent, on_bad_box="repair", **options)
    return read_screenspot(f"{file.name}{suffix}", read_options, images="imgs")


def test_a_row_asks_seeclick_for_the_box_of_an_instruction(file):
    [row] = rows_of(file, ":icon")
    image, *question = row.turns[0].parts
    assert isinstance(image, ImageSource)
    assert image.size == (1170, 2532)
    assert question == [  # the instruction is text, whatever it spells
        "In this UI screenshot, what is the position of the element corresponding to the command "
        '"open "<ref>settings"" (with point)?'
    ]
    assert row.answer.parts == (GroundedObject(boxes=(Box(x0=49, y0=1134, x1=173, y1=1264),)),)
    assert row.columns == {"data_type": "icon", "data_source": "ios"}
    assert row.where == f"{file}:1 (row 1)"


def test_all_rows_or_those_of_a_type_are_read(file):
    assert len(rows_of(file)) == 2
    assert len(rows_of(file, "#1")) == 1
    [row] = rows_of(file, ":text", prompt="{image}Generate the bounding box of {question}")
    assert row.turns[0].parts[1] == "Generate the bounding box of see the time"
    assert row.answer.parts[0].boxes == (Box(x0=0, y0=0, x1=1170, y1=20),)
    assert "repaired" in row.notes[0]
    with pytest.raises(DataError, match="has no rows of data_type 'image'; it has icon, text"):
        rows_of(file, ":image")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"bbox": ["1", 2, 3, 4]}, "bbox"),
        ({"instruction": None}, "instruction"),
        ({"img_filename": 3}, "img_filename"),
    ],
)
def test_a_row_in_another_format_is_named(file, change, found):
    file.write_text(json.dumps([ROWS[0], {**ROWS[1], **change}]))
    where = re.escape(f"{file}:1 (row 2): is not in ScreenSpot's published format")
    with pytest.raises(DataError, match=rf"{where}: .*\{{'{found}'"):
        rows_of(file)


@pytest.fixture
def parquet(file):
    """The rows of `file` and those of other platforms in two parquet files."""
    content = (file.parent / "imgs/mobile_1.png").read_bytes()
    rows = []
    for source, box in (
        ("ios", (49, 1134, 173, 1264)),
        ("windows", (1, 2, 3, 4)),
        ("shop", 4 * [9]),
    ):
        x0, y0, x1, y1 = box
        row = {**ROWS[0], "data_source": source, "file_name": "1.png", "image": {"bytes": content}}
        row["bbox"] = [x0 / 1170, y0 / 2532, x1 / 1170, y1 / 2532]
        rows.append(row)
    for number, part in enumerate((rows[:1], rows[1:])):
        pq.write_table(pa.Table.from_pylist(part), file.parent / f"test-{number}.parquet")
    return rows


def test_rows_in_parquet_files_are_those_of_the_json_files(file, parquet):
    options = {"read_options": ReadOptions(root=file.parent), "images": "none"}
    [expected] = rows_of(file, ":icon")
    read = read_screenspot("x/screenspot_mobile.json:icon", **options, parquet="test-*.parquet")
    assert read[0].turns[0].parts[1:] == expected.turns[0].parts[1:]
    assert read[0].images[0].key == expected.images[0].key
    [box] = read[0].answer.parts[0].boxes
    box = to_frame(box, "pixel", size=(1170, 2532))
    assert (box.x0, box.y0, box.x1, box.y1) == pytest.approx((49, 1134, 173, 1264))
    assert (read[0].columns, len(read)) == (expected.columns, 1)
    for platform in ("desktop", "web"):
        assert len(read_screenspot(f"{platform}.json", **options, parquet="test-*.parquet")) == 1
    with pytest.raises(DataError, match=r"has no rows for tv.json; name one of screenspot_mobile"):
        read_screenspot("tv.json", **options, parquet="test-*.parquet")
    with pytest.raises(DataError, match=r"has no rows of data_type 'text'; it has icon"):
        read_screenspot("web.json:text", **options, parquet="test-*.parquet")


@pytest.mark.parametrize(
    "change",
    [{"bbox": [9.0, 9.0, 20.0, 30.0]}, {"data_source": "tv"}, {"image": None}, {"file_name": None}],
)
def test_a_row_of_a_parquet_file_in_another_format_is_named(file, parquet, change):
    table = pa.Table.from_pylist([parquet[0], {**parquet[1], **change}])
    pq.write_table(table, file.parent / "bad.parquet")
    with pytest.raises(DataError, match=r"\(row 2, .*published format: expected image, "):
        read_screenspot("web.json", ReadOptions(root=file.parent), images="", parquet="bad.parquet")


def test_a_missing_screenshot_is_named(file):
    (file.parent / "imgs/mobile_1.png").unlink()
    with pytest.raises(DataError, match=r"\(row 1\).*imgs/mobile_1\.png does not exist"):
        rows_of(file, ":icon")[0]


def test_files_that_users_download_are_named_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match=r"lacks screenspot, which is not fetched; the head of"):
        check_screenspot(tmp_path)
    (tmp_path / "screenspot").mkdir()
    check_screenspot(tmp_path)


def test_nothing_is_needed_in_place_of_which_parquet_files_are_read(tmp_path):
    check_screenspot(tmp_path, parquet="hf://rootsautomation/ScreenSpot:test")
