"""Points and boxes as plain text, as SeeClick writes them: `data.boxes`."""

import json
import random

import pytest
from commands import compose_config
from tiny_qwen3_vl import image, talk, tiny_processor

from qwenvl_lit import build
from qwenvl_lit.cli.from_run import _groups
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.models.unit_text import objects_from_text, text_from_object
from qwenvl_lit.types import Box, DataError, GroundedObject, Point, Quad

TOKENIZER = QwenTokenizer(TINY_VOCABULARY)
PICTURE = image(200, 100)
BUTTON = Box(x0=34, y0=6, x1=66, y1=20)
KINDS = ("qwen_vl", "qwen2_5_vl", "qwen3_vl")


def processor_of(kind: str, boxes: str | None):
    if kind == "qwen_vl":
        return QwenVLProcessor(TOKENIZER, tokens_per_image=4, image_size=16, boxes=boxes)
    return tiny_processor(kind, boxes=boxes)


def reference(kind: str, boxes: str | None, *answer) -> str:
    return processor_of(kind, boxes).read("", talk((PICTURE, "Where?"), answer)).reference


def test_a_box_is_its_corners_or_its_center_in_fractions_of_two_decimals():
    button = GroundedObject(boxes=(BUTTON,))
    assert text_from_object(button, [PICTURE], "unit_text") == "(0.17,0.06,0.33,0.20)"
    assert text_from_object(button, [PICTURE], "unit_points") == "(0.25,0.13)"
    quad = Quad(points=((0, 50), (100, 0), (200, 50), (100, 100)))
    both = GroundedObject(label="it", boxes=(quad, Point(x=999, y=0, frame="grid")))
    assert text_from_object(both, [PICTURE], "unit_text") == "it (0.00,0.00,1.00,1.00) (1.00,0.00)"
    assert text_from_object(GroundedObject(label="it"), [], "unit_points") == "it"


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("(0.17,0.06)", Point(x=0.17, y=0.06, frame="unit")),
        ("It is at ( 0.17 , .06 ).", Point(x=0.17, y=0.06, frame="unit")),
        ("(1,0)", Point(x=1, y=0, frame="unit")),
        ("(-0.01,1.02)", Point(x=-0.01, y=1.02, frame="unit")),  # outside, as it was answered
        ("(0.17,0.06,0.33,0.20)", Box(x0=0.17, y0=0.06, x1=0.33, y1=0.2, frame="unit")),
        ("(0.3,0.2,0.1,0.06)", Box(x0=0.3, y0=0.2, x1=0.1, y1=0.06, frame="unit")),
    ],
)
def test_points_and_boxes_are_read_from_answers(text, region):
    found = [part for part in objects_from_text(text, image=2) if not isinstance(part, str)]
    assert found == [GroundedObject(boxes=(region,), image=2)]


@pytest.mark.parametrize(
    "text", ["", "(12,34)", "(2023, 5)", "(0.1,0.2,0.3)", "0.17,0.06", "[0.1,0.2]", "(a,b)"]
)
def test_what_is_no_place_in_an_image_stays_text(text):
    assert objects_from_text(text) == ((text,) if text else ())


def test_the_text_around_places_is_kept():
    parts = objects_from_text("From (0.10,0.20) to (0.30,0.40), done")
    assert [part for part in parts if isinstance(part, str)] == ["From ", " to ", ", done"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boxes", ["unit_text", "unit_points"])
def test_what_is_written_is_read_back_within_half_a_step(kind, boxes):
    processor, generator = processor_of(kind, boxes), random.Random(0)
    for _ in range(50):
        x0, x1 = sorted(generator.uniform(0, 200) for _ in range(2))
        y0, y1 = sorted(generator.uniform(0, 100) for _ in range(2))
        row = talk((PICTURE,), (GroundedObject(boxes=(Box(x0=x0, y0=y0, x1=x1, y1=y1),)),))
        [obj] = processor.read(processor.read("", row).reference, row).parts
        [found] = obj.boxes
        assert found.frame == "pixel"
        pairs = (
            [(found.x0, x0, 2), (found.y0, y0, 1), (found.x1, x1, 2), (found.y1, y1, 1)]
            if (boxes == "unit_text")
            else [(found.x, (x0 + x1) / 2, 2), (found.y, (y0 + y1) / 2, 1)]
        )
        for ours, expected, step_px in pairs:
            assert abs(ours - expected) <= step_px / 2 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_objects_of_rows_are_trained_as_ordinary_text(kind):
    processor = processor_of(kind, "unit_points")
    label, place = GroundedObject(label="OK"), GroundedObject(boxes=(BUTTON,))
    sample = processor.encode(talk((PICTURE, "Click ", label, " near ", place), (place,)))
    text = processor.text(sample.input_ids.tolist())
    assert "Click OK near (0.25,0.13)<|im_end|>" in text
    assert "assistant\n(0.25,0.13)<|im_end|>" in text
    assert reference(kind, "unit_text", place, "!") == "(0.17,0.06,0.33,0.20)!"
    assert processor.settings != processor_of(kind, None).settings  # cached lengths depend on it
    with pytest.raises(ValueError, match="boxes is one of unit_text, unit_points, got 'unit'"):
        processor_of(kind, "unit")


def test_the_tags_of_qwen_vl_are_still_read():
    parts = (
        processor_of("qwen_vl", "unit_text")
        .read("<ref>a</ref><box>(0,0),(999,999)</box> and (0.50,0.50)", talk((PICTURE,)))
        .parts
    )
    assert parts[0].boxes == (Box(x0=0, y0=0, x1=200, y1=100),)
    assert parts[2].boxes == (Point(x=100, y=50),)


def test_without_the_setting_such_answers_are_text():
    assert processor_of("qwen_vl", None).read("(0.17,0.06)", talk((PICTURE,))).parts == (
        "(0.17,0.06)",
    )


def test_a_point_needs_a_form_in_which_it_can_be_written():
    point = GroundedObject(label="OK", boxes=(Point(x=1, y=2),))
    with pytest.raises(
        DataError, match=r"rows\.jsonl:7: row 'row-7': object 'OK' has a point.*data\.boxes=unit"
    ):
        processor_of("qwen_vl", None).encode(talk((PICTURE,), (point,)))


def row_config(tmp_path, *arguments):
    PICTURE.open().save(tmp_path / "a.png")
    button = {"caption": "OK", "bbox": [34, 6, 66, 20], "bbox_type": "real", "image": 0}
    point = {"caption": "OK", "bbox": [0.5, 0.25], "bbox_type": "norm_1", "image": 0}
    rows = []
    for obj in (button, point):
        row = {"query": "<image>Click <ref-object>", "response": "<bbox>", "images": ["a.png"]}
        rows.append(json.dumps({**row, "objects": [obj]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    files = [f"paths.run={tmp_path}", f"data.train={tmp_path}/rows.jsonl", "data.validation=null"]
    return compose_config("train", "data=jsonl", f"paths.cache={tmp_path}", *files, *arguments)


def test_the_key_of_the_data_reaches_the_processor_and_rows_may_have_points(tmp_path):
    config = row_config(tmp_path, "data.boxes=unit_text")
    processor = build.processor(config)
    training, _ = build.data(config, processor).sets()
    texts = [processor.read("", row).reference for row in training["train"]]
    assert texts == ["(0.17,0.06,0.33,0.20)", "(0.50,0.25)"]
    assert processor.find_prompt.endswith('"{question}" (with bbox)?')


def test_a_run_keeps_its_form_whatever_the_data_of_another_command(tmp_path):
    stored = {"model": {"boxes": "${oc.select:data.boxes,null}"}, "data": {"boxes": "unit_text"}}
    assert _groups(stored)["model"]["boxes"] == "unit_text"
    config = row_config(tmp_path, "data.boxes=unit_text")
    with pytest.raises(DataError, match=r"data\.boxes=unit_text: the model writes boxes as null"):
        build.data(config, processor_of("qwen_vl", None))
