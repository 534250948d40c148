import numpy as np
import pytest
from PIL import Image, ImageColor
from toy_task import conversation, grounded

from qwenvl_lit.rendering.drawing import EXPECTED, PREDICTED, draw_objects, draw_prediction
from qwenvl_lit.rendering.fonts import font_for, shortened
from qwenvl_lit.types import GroundedObject, Point, Prediction, Quad


def pixels(image: Image.Image, color: str) -> np.ndarray:
    return (np.asarray(image) == ImageColor.getrgb(color)).all(-1)


def test_small_images_are_enlarged_by_a_whole_number_and_large_ones_kept():
    assert draw_objects(Image.new("RGB", (64, 32)), []).size == (320, 160)
    assert draw_objects(Image.new("RGB", (319, 100)), []).size == (638, 200)
    assert draw_objects(Image.new("RGB", (640, 427)), []).size == (640, 427)


def test_a_large_image_can_be_shrunk_before_drawing():
    image, box = Image.new("RGB", (1200, 3000)), grounded("", 0, 1500, 600, 3000)
    drawn = draw_objects(image, [box], largest_side_px=320)
    assert drawn.size == (128, 320)
    rows, columns = np.nonzero(pixels(drawn, PREDICTED))
    assert rows.min() == pytest.approx(160, abs=2)
    assert columns.max() == pytest.approx(64, abs=2)


@pytest.mark.parametrize(
    ("size", "largest_side_px", "drawn_size"),
    [
        ((2000, 40), 320, (320, 64)),  # 6 px high without stretching
        ((40, 2000), 320, (64, 320)),
        ((3, 700), None, (64, 700)),
        ((20_000, 100), 480, (480, 64)),
        ((1000, 200), 320, (320, 64)),
    ],
)
def test_a_thin_image_is_stretched_until_its_boxes_are_seen(size, largest_side_px, drawn_size):
    width, height = size
    box = grounded("a sign", width / 4, height / 4, width / 2, height / 2)
    drawn = draw_objects(Image.new("RGB", size), [box], largest_side_px=largest_side_px)
    assert drawn.size == drawn_size
    rows, columns = np.nonzero(pixels(drawn, PREDICTED))
    assert rows.max() == pytest.approx(drawn_size[1] / 2, abs=3)
    assert columns.min() == pytest.approx(drawn_size[0] / 4, abs=3)
    assert pixels(drawn, PREDICTED).mean() < 0.5  # labels and lines leave most of the image free


def test_predicted_boxes_are_solid_and_expected_ones_dashed():
    black, box = Image.new("RGB", (400, 400)), grounded("", 100, 100, 300, 300)
    solid = pixels(draw_objects(black, [box]), PREDICTED)[100, 100:301]
    dashed = pixels(draw_objects(black, [], [box]), EXPECTED)[100, 100:301]
    assert solid.all()
    assert 0.4 < dashed.mean() < 0.7
    assert dashed[0]
    assert dashed[-1]


def test_an_equal_expected_box_is_seen_on_the_predicted_one():
    black, box = Image.new("RGB", (400, 400)), grounded("", 100, 100, 300, 300)
    drawn = draw_objects(black, [box], [box])
    predicted, expected = (pixels(drawn, color)[100, 100:301] for color in (PREDICTED, EXPECTED))
    assert 0.3 < predicted.mean() < 0.6
    assert (predicted | expected).all()


def test_the_given_image_is_not_changed():
    image = Image.new("RGB", (400, 400))
    draw_objects(image, [grounded("dog", 0, 0, 100, 100)])
    assert not np.asarray(image).any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(mode):
    assert draw_objects(Image.new(mode, (64, 64)), [grounded("dog", 0, 0, 9, 9)]).mode == "RGB"


@pytest.mark.parametrize(
    "wild",
    [
        grounded("inverted", 300, 300, 100, 100),
        grounded("outside", -500, -500, 99999, 99999),
        grounded("a point", 5, 5, 5, 5),
        grounded("two\nlines", 0, 0, 9, 9),
        grounded(" \n", 0, 0, 9, 9),
        grounded("a label much longer than the image is wide " * 5, 0, 0, 9, 9),
        grounded("一只狗", 0, 0, 9, 9),
        GroundedObject(label=None),
        GroundedObject(label="no box"),
        GroundedObject(
            label="quad", boxes=(Quad(points=((50, 50), (200, 80), (180, 160), (40, 140))),)
        ),
    ],
)
def test_any_answer_of_a_model_can_be_drawn(wild):
    image = Image.new("RGB", (400, 300))
    assert draw_objects(image, [wild], [wild]).size == (400, 300)


def test_boxes_outside_of_the_image_are_drawn_at_its_edge():
    image, box = Image.new("RGB", (400, 300)), grounded("", -50, 100, 500, 200)
    drawn = pixels(draw_objects(image, [box]), PREDICTED)
    assert drawn[150, 0]
    assert drawn[150, 399]
    assert drawn[100].all()
    assert not drawn[150, 5:395].any()


def test_labels_of_equal_boxes_do_not_cover_each_other():
    box = grounded("dog", 100, 100, 300, 200)
    drawn = draw_objects(Image.new("RGB", (400, 300)), [box], [box])
    assert pixels(drawn, PREDICTED)[86:96, 110].any()  # above
    assert pixels(drawn, EXPECTED)[204:214, 110].any()  # below


def test_labels_of_several_equal_boxes_do_not_cover_each_other():
    boxes = [grounded("dog", 100, 100, 300, 200)]
    areas = []
    for count in range(1, 7):
        drawn = draw_objects(Image.new("RGB", (400, 300)), boxes * count)
        areas.append(pixels(drawn, PREDICTED).sum())
    added = np.diff(areas)
    assert (added > 0.4 * added.max()).all()  # labels inside of the box cover its lines


def test_a_long_label_is_cut_to_the_width_of_the_image():
    label = "word " * 50
    short = shortened(label, font_for(label, 13), 400 - 4)
    image = Image.new("RGB", (400, 300))
    one, two = (draw_objects(image, [grounded(each, 50, 50, 99, 99)]) for each in (label, short))
    assert short.endswith("...")
    assert (np.asarray(one) == np.asarray(two)).all()


def test_a_prediction_is_drawn_with_its_expected_answer():
    expected = [
        "a ",
        grounded("dog", 0, 0, 0.5, 0.5, frame="unit"),
        grounded("elsewhere", 0, 0, 1, 1, frame="unit"),
    ]
    row = conversation(0, answer=expected)
    predicted = ("a ", grounded("dog", 32, 32, 64, 64))
    drawn = draw_prediction(Prediction(conversation=row, text="", parts=predicted))
    assert drawn.size == (320, 320)
    assert pixels(drawn, PREDICTED)[200, 160]
    assert pixels(drawn, EXPECTED)[:, 160].any()


def test_a_predicted_point_is_a_circle_with_a_dot_and_an_expected_one_a_circle():
    black = Image.new("RGB", (400, 400))
    point = GroundedObject(label="OK", boxes=(Point(x=200, y=100),))
    predicted = pixels(draw_objects(black, [point]), PREDICTED)
    expected = pixels(draw_objects(black, [], [point]), EXPECTED)
    assert predicted[100, 200]
    assert not expected[100, 200]
    for drawn in (predicted, expected):
        circle = np.flatnonzero(drawn[100])
        assert circle.min() == pytest.approx(200 - 12, abs=1)
        assert circle.max() == pytest.approx(200 + 12, abs=1)
    outside = GroundedObject(boxes=(Point(x=-50, y=900),))  # moved to the edge
    assert pixels(draw_objects(black, [outside]), PREDICTED)[399, 0]
