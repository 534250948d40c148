import random
import time

import pytest
from tiny_qwen3_vl import KINDS, box, cat, image, talk, tiny_processor

from qwenvl_lit.grounding import iou
from qwenvl_lit.models.qwen3_vl.boxes import Scale, objects_from_text
from qwenvl_lit.types import Box, DataError, GroundedObject, Point, Quad

GRID = Scale(1000, 1000)
ANSWER = {
    # 200 x 100 px are resized to 168 x 84 px; thousandths do not depend on it.
    "qwen2_5_vl": '```json\n[\n\t{"bbox_2d": [8, 17, 84, 42], "label": "cat"}\n]\n```',
    "qwen3_vl": '```json\n[\n\t{"bbox_2d": [50, 200, 500, 500], "label": "cat"}\n]\n```',
}


def written(kind: str, *parts, picture=(200, 100), question=()) -> str:
    """The answer `parts` about an image, as the model is taught to write it."""
    conversation = talk((image(*picture), *question), parts)
    return tiny_processor(kind).read("", conversation).reference


def boxes_of(text: str, scale: Scale | None = GRID) -> list[tuple[float, ...]]:
    """The boxes of a text in whole thousandths."""
    found = []
    for part in objects_from_text(text, scale):
        if isinstance(part, GroundedObject):
            found += [(b.x0, b.y0, b.x1, b.y1) for b in part.boxes]
    return [tuple(round(value * 1000) for value in corners) for corners in found]


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_written_as_the_model_was_trained(kind):
    assert written(kind, cat(10, 20, 100, 50)) == ANSWER[kind]


@pytest.mark.parametrize("between", [(), (", ",), ("\n",), (" ;\n",)])
def test_objects_that_follow_each_other_are_one_list(between):
    text = written("qwen3_vl", cat(0, 0, 100, 50), *between, cat(0, 0, 200, 100, label="猫"), ".")
    assert text == (
        '```json\n[\n\t{"bbox_2d": [0, 0, 500, 500], "label": "cat"},\n'
        '\t{"bbox_2d": [0, 0, 1000, 1000], "label": "猫"}\n]\n```.'
    )


def test_text_between_objects_ends_a_list():
    text = written("qwen3_vl", cat(0, 0, 1, 1), " and ", cat(0, 0, 2, 2), ", ", "then.")
    assert text.count("```json") == 2
    assert "\n]\n``` and ```json" in text
    assert text.endswith("\n]\n```, then.")


def test_each_box_of_an_object_is_an_item():
    both = GroundedObject(label="cats", boxes=(box(0, 0, 20, 10), box(20, 0, 40, 10)))
    text = written("qwen3_vl", both)
    assert text.count('"label": "cats"') == 2
    assert boxes_of(text) == [(0, 0, 100, 100), (100, 0, 200, 100)]


def test_an_object_without_a_label_or_without_boxes_is_written():
    unlabeled = GroundedObject(boxes=(box(0, 0, 20, 10),))
    assert '\t{"bbox_2d": [0, 0, 100, 100]}\n' in written("qwen3_vl", unlabeled)
    assert written("qwen3_vl", GroundedObject(label="a cat"), "!") == "a cat!"


@pytest.mark.parametrize("frame", ["grid", "unit", "pixel"])
def test_boxes_may_be_in_any_frame(frame):
    corners = {
        "grid": (0, 333, 666, 999),
        "unit": (0, 1 / 3, 2 / 3, 1),
        "pixel": (0, 100, 200, 300),
    }
    obj = GroundedObject(label="x", boxes=(box(*corners[frame], frame=frame),))
    assert "[0, 333, 667, 1000]" in written("qwen3_vl", obj, picture=(300, 300))


def test_a_quad_is_written_as_the_box_around_it():
    quad = Quad(points=((10, 0), (20, 10), (10, 20), (0, 10)))
    obj = GroundedObject(label="x", boxes=(quad,))
    assert "[0, 0, 200, 200]" in written("qwen3_vl", obj, picture=(100, 100))


def test_in_a_question_an_object_is_text():
    processor = tiny_processor("qwen3_vl")
    unlabeled = GroundedObject(boxes=(box(0, 0, 20, 10), box(20, 0, 40, 10)))
    parts = (image(200, 100), "Is ", cat(0, 0, 100, 50), " left of ", unlabeled, "?")
    prompt = processor.encode(talk(parts, "No."), prompt=True)
    text = processor.text(prompt.input_ids.tolist())
    expected = "Is cat [0, 0, 500, 500] left of [0, 0, 100, 100] [100, 0, 200, 100]?"
    assert expected in text
    assert "Find dog" in processor.text(
        processor.encode(
            talk(("Find ", GroundedObject(label="dog")), "x"), prompt=True
        ).input_ids.tolist()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_of_an_image_that_does_not_exist_names_the_row(kind):
    wrong = GroundedObject(label="cat", boxes=(box(0, 0, 1, 1),), image=3)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: row 'row-7': object 'cat' names image 3"):
        tiny_processor(kind).length(talk((image(9, 9),), (wrong,)))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_come_back_within_a_pixel_of_the_numbers_written(kind):
    processor = tiny_processor(kind, max_pixels=400_000)
    generator = random.Random(0)
    for _ in range(300):
        size = generator.randint(30, 900), generator.randint(30, 900)
        corners = []
        for side in size:
            corners.append(sorted(generator.uniform(0, side) for _ in range(2)))
        (x0, x1), (y0, y1) = corners
        conversation = talk((image(*size),), (cat(x0, y0, x1, y1),))
        answer = processor.read("", conversation).reference
        [obj] = processor.read(answer, conversation).parts
        [found] = obj.boxes
        assert obj.label == "cat"
        assert found.frame == "pixel"
        resized = processor.images.resized(conversation.images[0])
        written = resized if kind == "qwen2_5_vl" else (1000, 1000)
        for start, ours, expected in ((0, found.x0, x0), (0, found.x1, x1), (1, found.y0, y0)):
            step = max(1, size[start] / written[start])
            assert abs(ours - expected) <= 0.51 * step


ITEM = '{"bbox_2d": [1, 2, 3, 4], "label": "a"}'


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n[\n\t{ITEM}\n]\n```",
        f"[{ITEM}]",
        ITEM,
        f"Sure, here it is: {ITEM} Anything else?",
        f"```\n{ITEM}\n```",
        f'```json\n[{ITEM}, {{"bbox_2d": [5, 6, 7',
        '{"bbox": [1, 2, 3, 4], "label": "a"}',
        '{"label": "a", "box": ["1", "2", 3.0, 4]}',
        "{'bbox_2d': (1, 2, 3, 4), 'label': 'a'}",
        '{"bbox_2d": [[1, 2], [3, 4]], "label": "a"}',
        '{"bbox_2d": "1, 2, 3, 4", "text_content": "a"}',
        f'{{"objects": [{ITEM}]}}',
    ],
)
def test_answers_are_read_in_many_forms(text):
    assert boxes_of(text) == [(1, 2, 3, 4)]
    [obj] = [part for part in objects_from_text(text, GRID) if isinstance(part, GroundedObject)]
    assert obj.label == "a"


def test_what_is_not_an_item_stays_text():
    text = f'Two: ```json\n[{ITEM}, {ITEM}]\n``` and {{"point_3d": [1, 2]}} [{{"bbox_2d": [5'
    before, first, second, after = objects_from_text(text, GRID)
    assert (before, first.label, second.label) == ("Two:", "a", "a")
    assert after == ' and {"point_3d": [1, 2]} [{"bbox_2d": [5'


def test_points_are_items_too():
    text = f'[{{"point_2d": [100, 250], "label": "p"}}, {ITEM}]'
    point, box_of_a = objects_from_text(text, GRID)
    assert point == GroundedObject(label="p", boxes=(Point(x=0.1, y=0.25, frame="unit"),))
    assert box_of_a.label == "a"
    assert objects_from_text('{"point_2d": [1, 2, 3]}', GRID) == ('{"point_2d": [1, 2, 3]}',)
    two = objects_from_text('{"point_2d": [[1, 2], [3, 4]]}', None)[0].boxes
    assert two == (Point(x=1, y=2), Point(x=3, y=4))
    obj = GroundedObject(label="p", boxes=(Point(x=20, y=25),))
    assert '{"point_2d": [100, 250], "label": "p"}' in written("qwen3_vl", obj)


@pytest.mark.parametrize(
    "text",
    [
        "no box",
        "",
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": [1, 2, 3, NaN]}',
        '{"bbox_2d": [1, 2, 3, 1e400]}',
        '{"bbox_2d": [true, 2, 3, 4]}',
        '{"bbox_3d": [1, 2, 3, 4, 5, 6, 7, 8, 9]}',
        '{"bbox_2d": null}',
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
    ],
)
def test_an_answer_without_boxes_is_text(text):
    assert objects_from_text(text, GRID) == ((text,) if text else ())


def test_an_answer_may_be_bare_numbers_if_it_has_no_item():
    assert boxes_of("It is at [1, 2.5, 3, 4].") == [(1, 2, 3, 4)]
    assert boxes_of(f"[9, 9, 9, 9] {ITEM}") == [(1, 2, 3, 4)]


def test_several_boxes_of_an_item_belong_to_one_object():
    [obj] = objects_from_text('{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "cats"}', GRID)
    assert len(obj.boxes) == 2


def test_swapped_corners_and_boxes_outside_are_kept():
    assert boxes_of('{"bbox_2d": [900, 800, 100, -50]}') == [(900, 800, 100, -50)]
    swapped = Box(x0=3, y0=4, x1=1, y1=2)
    assert iou(swapped, swapped) == 0


def test_boxes_of_an_answer_are_on_the_last_image_of_the_prompt():
    conversation = talk((image(10, 10), image(500, 100)), "x")
    prediction = tiny_processor("qwen3_vl").read(ITEM, conversation)
    [obj] = prediction.parts
    assert obj.image == 1
    assert obj.boxes == (Box(x0=0.5, y0=0.2, x1=1.5, y1=0.4),)


@pytest.mark.parametrize(("kind", "frame"), [("qwen2_5_vl", "pixel"), ("qwen3_vl", "unit")])
def test_boxes_without_an_image_are_kept(kind, frame):
    [obj] = tiny_processor(kind).read(ITEM, talk("q", "a")).parts
    assert obj.boxes[0].frame == frame


@pytest.mark.parametrize("part", ["{", '{"', "[1,", '{"a":', "{'a'", " ", '{"bbox_2d":', "\\"])
def test_reading_takes_linear_time(part):
    start = time.monotonic()
    objects_from_text(part * 50_000, GRID)
    assert time.monotonic() - start < 5
