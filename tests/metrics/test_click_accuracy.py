import pytest
from toy_task import conversation, grounded

from qwenvl_lit.metrics.boxes import GroundedAccuracy, MeanIoU
from qwenvl_lit.metrics.click_accuracy import ClickAccuracy, clicked_point_official
from qwenvl_lit.types import GroundedObject, Point, Prediction

BUTTON = grounded("OK", 16, 16, 32, 48)  # 0.25, 0.25 to 0.5, 0.75 of 64 x 64 px


def point(x: float, y: float, frame: str = "pixel") -> GroundedObject:
    return GroundedObject(boxes=(Point(x=x, y=y, frame=frame),))


def score(*parts, text: str = "", expected=(BUTTON,), protocol: str = "correct") -> float | None:
    row = conversation(0, answer=expected)
    return ClickAccuracy(protocol).score(Prediction(conversation=row, text=text, parts=parts))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (point(24, 32), 1),
        (point(16, 48), 1),  # on the edge
        (point(15, 32), 0),
        (point(0.4, 0.5, "unit"), 1),
        (point(499, 749, "grid"), 1),
        (grounded("", 0, 0, 48, 64), 1),  # its center is 24, 32
        (grounded("", 0, 0, 24, 32), 0),  # it overlaps the button, and its center is 12, 16
        ("no place", 0),
    ],
)
def test_the_point_or_the_center_of_the_box_must_lie_in_the_expected_box(answer, right):
    assert score("Here: ", answer) == right


def test_only_the_first_place_counts():
    assert score(point(0, 0), point(24, 32)) == 0


def test_rows_without_an_expected_box_are_left_out():
    assert score(point(24, 32), expected=("yes",)) is None
    expected = (point(24, 32),)
    assert score(point(24, 32), expected=expected) is None
    prediction = Prediction(conversation=conversation(0, answer=expected), text="", parts=expected)
    assert MeanIoU().score(prediction) is None
    assert GroundedAccuracy().score(prediction) is None


@pytest.mark.parametrize(
    ("text", "place"),
    [  # what `screenspot_test.py` computes
        ("(0.17,0.06)", (0.17, 0.06)),
        ("(0.1,0.2,0.3,0.6)", (0.2, 0.4)),
        ("2 of them: 0.5", (2, 0.5)),
        ("<ref>OK</ref><box>(100,200),(300,600)</box>", (0.2, 0.4)),
        ("<box>(0,0),(1000,1000)</box><box>(0,0),(2,2)</box>", (0.5, 0.5)),
        ("<box>(100, 200),(300,600)</box>", None),  # a blank
        ("the box is at 0.5, 0.5", None),  # the word, without tags
        ("1. (0.17,0.06)", None),  # three numbers
        ("no", None),
    ],
)
def test_the_official_score_reads_answers_as_the_script_does(text, place):
    found = clicked_point_official(text)
    assert (found and (found.x, found.y)) == (place and pytest.approx(place))


def test_the_official_score_counts_answers_without_a_point_as_wrong():
    assert score(text="(0.25,0.75)", protocol="official") == 1
    assert score(text="1. (0.25,0.75)", protocol="official") == 0
    assert score(point(24, 32), text="nothing", protocol="official") == 0
