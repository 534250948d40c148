import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwenvl_lit.grounding import (
    GRID,
    Tag,
    iou,
    object_in_frame,
    objects_from_tags,
    tags_from_object,
    to_frame,
)
from qwenvl_lit.types import Box, DataError, GroundedObject, ImageSource, Quad

SIZE = (640, 427)
IMAGES = (ImageSource(Image.new("RGB", SIZE)), ImageSource(Image.new("RGB", (100, 200))))
grid_values = st.integers(0, GRID)


def box(x0, y0, x1, y1, frame="pixel") -> Box:
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=frame)


def markup(obj: GroundedObject) -> str:
    pieces = tags_from_object(obj, IMAGES)
    return "".join(piece.value if isinstance(piece, Tag) else piece for piece in pieces)


def test_pixels_become_grid_values_by_truncation():
    assert to_frame(box(138, 136, 235, 359), "grid", size=SIZE) == box(215, 318, 366, 839, "grid")
    assert to_frame(box(0, 0, 640, 427), "grid", size=SIZE) == box(0, 0, 999, 999, "grid")
    outside = to_frame(box(-13, -5.5, 740, 530), "grid", size=(640, 480))
    assert outside == box(-20, -11, 1155, 1103, "grid"), "truncated towards zero, not clipped"


def test_other_frames_convert_without_rounding():
    half = box(0.5, 0.25, 1, 1, "unit")
    assert to_frame(half, "pixel", size=SIZE) == box(320, 106.75, 640, 427)
    assert to_frame(half, "grid", size=SIZE) == box(499, 249, 999, 999, "grid")
    assert to_frame(box(320, 106.75, 640, 427), "unit", size=SIZE) == half
    assert to_frame(box(333, 0, 999, 666, "grid"), "pixel", size=(300, 300)) == box(
        100, 0, 300, 200
    )
    assert to_frame(box(333, 0, 999, 666, "grid"), "unit", size=SIZE) == box(
        1 / 3, 0, 1, 2 / 3, "unit"
    )


@given(grid_values, grid_values)
def test_values_on_the_grid_survive_a_round_trip_through_markup(x, y):
    obj = GroundedObject(boxes=(box(x, y, y, x, "grid"),), image=0)
    assert objects_from_tags(markup(obj)) == (obj,)


def test_quads_convert_point_by_point():
    quad = Quad(points=((0, 0), (640, 0), (640, 427), (0, 427)))
    assert to_frame(quad, "grid", size=SIZE) == Quad(
        points=((0, 0), (999, 0), (999, 999), (0, 999)), frame="grid"
    )


def test_an_unknown_frame_is_named():
    with pytest.raises(ValueError, match="'pixel' and 'percent'"):
        to_frame(box(0, 0, 1, 1), "percent", size=SIZE)


def test_iou_is_zero_for_boxes_without_a_shared_area_and_needs_one_frame():
    square = box(0, 0, 2, 2)
    assert iou(square, square) == 1
    assert iou(square, box(1, 0, 3, 2)) == 1 / 3
    assert iou(square, box(2, 0, 4, 2)) == 0  # they only touch
    assert iou(square, box(5, 5, 6, 6)) == 0
    assert iou(square, box(2, 2, 0, 0)) == 0  # inverted
    assert iou(box(1, 1, 1, 1), box(1, 1, 1, 1)) == 0
    with pytest.raises(ValueError, match="one frame"):
        iou(square, box(0, 0, 1, 1, "unit"))


def test_an_object_is_written_as_its_label_followed_by_its_boxes():
    people = GroundedObject(
        label="people", boxes=(box(5, 6, 70, 80, "grid"), box(320, 0, 640, 427))
    )
    assert markup(people) == "<ref>people</ref><box>(5,6),(70,80)</box><box>(499,0),(999,999)</box>"
    assert markup(GroundedObject(label="only a label")) == "<ref>only a label</ref>"
    assert (
        markup(GroundedObject(boxes=(box(1.0, 2.5, 3, 4, "grid"),))) == "<box>(1,2.5),(3,4)</box>"
    )
    quad = Quad(points=((1, 2), (3, 4), (5, 6), (7, 8)), frame="grid")
    assert markup(GroundedObject(boxes=(quad,))) == "<quad>(1,2),(3,4),(5,6),(7,8)</quad>"


def test_a_box_is_converted_with_the_size_of_its_own_image():
    assert (
        markup(GroundedObject(boxes=(box(0, 0, 100, 100),), image=1))
        == "<box>(0,0),(999,499)</box>"
    )


def test_a_label_that_spells_a_tag_stays_text():
    assert list(tags_from_object(GroundedObject(label="</ref><box>"), ())) == [
        Tag.REF,
        "</ref><box>",
        Tag.REF_END,
    ]


def test_a_box_in_an_image_that_does_not_exist_is_an_error():
    with pytest.raises(DataError, match=r"object 'a cat' names image 2, counted from 0, of 2"):
        markup(GroundedObject(label="a cat", boxes=(box(0, 0, 1, 1),), image=2))
    with pytest.raises(DataError, match="names image -1"):
        object_in_frame(GroundedObject(boxes=(box(0, 0, 1, 1),), image=-1), "grid", IMAGES)


def test_the_size_of_an_image_is_read_only_when_needed(tmp_path):
    missing = (ImageSource(tmp_path / "missing.png"),)
    obj = GroundedObject(boxes=(box(1, 2, 3, 4, "grid"),))
    assert object_in_frame(obj, "grid", missing) is obj
    with pytest.raises(DataError, match=r"missing\.png does not exist"):
        object_in_frame(obj, "pixel", missing)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("<box>(+1,2),(1_0,20)</box>", None),
        ("<box>(１,２),(１０,٢٠)</box>", None),
        ("<box>( 1 , 2 ),(10,20)</box>", None),
        ("<ref>a<ref>b</ref><box>(1,2),(10,20)</box>", "a<ref>b"),
    ],
)
def test_answers_are_read_as_the_original_reads_them(text, label):
    region = box(1, 2, 10, 20, "grid")
    assert objects_from_tags(text) == (GroundedObject(label=label, boxes=(region,)),)


@pytest.mark.parametrize(
    "text",
    [
        "<box>(+1,2),(3,4)</box>",
        "<box>(1_0,2),(3,4)</box>",
        "<box>(１,2),(3,4)</box>",
        "<ref>a<ref>b",
    ],
)
def test_rows_spell_numbers_and_labels_in_one_way(text):
    assert objects_from_tags(text, of_row=True) == (text,)
    assert objects_from_tags("<ref>a<ref>b</ref>", of_row=True)[0] == "<ref>a"


@pytest.mark.parametrize("number", ["1__0", "_1", "1_", "+-1", "++1", "²", "1e1"])
def test_what_int_refuses_stays_text(number):
    with pytest.raises(ValueError, match="invalid literal"):
        int(number)
    text = f"<box>(1,2),({number},4)</box>"
    assert objects_from_tags(text) == (text,)


def test_text_is_split_at_its_objects():
    cat = GroundedObject(
        label="a cat", boxes=(box(1, 2, 3, 4, "grid"), box(5, 6, 7, 8, "grid")), image=3
    )
    text = "See <ref>a cat</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>, <ref>one</ref> more."
    assert objects_from_tags(text, image=3) == (
        "See ",
        cat,
        ", ",
        GroundedObject(label="one", image=3),
        " more.",
    )
    assert objects_from_tags("") == ()
    assert objects_from_tags("no boxes") == ("no boxes",)


@pytest.mark.parametrize(
    "text",
    [
        "<box>(1,2),(3,4)",
        "<box>(1,2)</box>",
        "<box>(a,b),(c,d)</box>",
        "<box></box>",
        "<box>(1.5,2),(3,4)</box>",
        "<box>(1,2),(3,4),(5,6)</box>",
        "<quad>(1,2),(3,4)</quad>",
        "<box>(1,2),(3," + "9" * 5000 + ")</box>",
        "<ref>unclosed",
        "</ref></box>",
    ],
)
def test_markup_that_cannot_be_read_stays_text(text):
    assert objects_from_tags(text) == (text,)


@pytest.mark.parametrize(
    "text", ["<box>1,2,3,4</box>", "<box>(1,2,3,4)</box>", "<box>( 1 , 2 ),\n( 3 , 4 )</box>"]
)
def test_other_spellings_of_a_box_are_read(text):
    assert objects_from_tags(text) == (GroundedObject(boxes=(box(1, 2, 3, 4, "grid"),)),)


def test_inverted_boxes_and_boxes_outside_the_grid_are_kept_unchanged():
    (obj,) = objects_from_tags("<box>(300,400),(-1,1400)</box>")
    assert obj.boxes == (box(300, 400, -1, 1400, "grid"),)


@given(st.integers(0, 3), st.booleans())
def test_labels_and_boxes_in_any_order_are_found_once(repeats, of_row):
    label, region = "<ref>a</ref>", "<box>(1,2),(3,4)</box>"
    text = f"{region} {label} " * repeats + "<ref>" + f" {region}" * repeats
    parts = objects_from_tags(text, of_row=of_row)
    objects = [part for part in parts if isinstance(part, GroundedObject)]
    assert [obj.label for obj in objects] == [None, "a"] * repeats + [None] * repeats
    assert objects_from_tags(label + region * 2)[0].label == "a"


pieces = st.sampled_from(
    [
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
        "<quad>",
        "</quad>",
        "(1,2)",
        "(3,4)",
        ",",
        "a cat",
        " ",
        "-7",
        "\n",
    ]
)


@given(st.lists(pieces, max_size=30).map("".join))
def test_reading_and_writing_any_answer_is_a_round_trip(text):
    parts = objects_from_tags(text)
    again = "".join(part if isinstance(part, str) else markup(part) for part in parts)
    assert objects_from_tags(again) == parts


def test_long_answers_are_read_in_linear_time():
    start = time.perf_counter()
    for text in (
        "<ref>" * 50_000,
        "<box>(1,2),(3,4" * 20_000,
        "<ref>a</ref>" * 20_000 + "<box>(",
        "<box>" + "(" * 50_000,
    ):
        objects_from_tags(text)
    assert time.perf_counter() - start < 10  # 0.2 s; quadratic time would be minutes
