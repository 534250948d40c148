import pytest
from PIL import Image
from toy_task import conversation, grounded

from qwenvl_lit.metrics.boxes import BoxAccuracy, GroundedAccuracy, MeanIoU, first_box_iou
from qwenvl_lit.types import (
    Box,
    Conversation,
    GroundedObject,
    ImageSource,
    Part,
    Prediction,
    Quad,
    Turn,
)


def prediction(predicted: list[Part], expected: list[Part], index: int = 0) -> Prediction:
    return Prediction(
        conversation=conversation(index, answer=expected), text="", parts=tuple(predicted)
    )


def test_the_expected_box_is_converted_from_its_frame():
    left_half = grounded("half", 0, 0, 32, 64)
    for expected, iou in (
        (grounded("half", 0, 0, 0.5, 1, frame="unit"), 1),
        (grounded("half", 0, 0, 999, 999, frame="grid"), 0.5),
        (grounded("half", 0, 0, 64, 64), 0.5),
    ):
        assert first_box_iou(prediction([left_half], [expected])) == iou


def test_only_the_first_box_counts():
    predicted = [grounded("a", 0, 0, 1, 1), grounded("b", 0, 0, 64, 64)]
    expected = [grounded("b", 32, 32, 64, 64), *predicted]
    assert first_box_iou(prediction(predicted, expected)) == 0


def test_an_iou_equal_to_the_threshold_is_right():
    whole = grounded("a", 0, 0, 64, 64)
    rows = [
        prediction([grounded("a", 0, 0, 32, 64)], [whole], 0),  # IoU 0.5
        prediction([grounded("a", 0, 0, 31, 64)], [whole], 1),
        prediction(["no box"], [whole], 2),
        prediction([whole], [whole], 3),
    ]
    accuracy, strict, mean = BoxAccuracy(), BoxAccuracy(0.75), MeanIoU()
    for metric in (accuracy, strict, mean):
        metric.update(rows)
    assert accuracy.compute() == 0.5
    assert strict.compute() == 0.25
    assert mean.compute() == pytest.approx((0.5 + 31 / 64 + 0 + 1) / 4)


def test_inverted_boxes_score_zero():
    inverted, expected = grounded("a", 64, 64, 0, 0), grounded("a", 0, 0, 64, 64)
    assert first_box_iou(prediction([inverted], [expected])) == 0


def test_a_quad_counts_as_the_box_around_it():
    quad = GroundedObject(label="a", boxes=(Quad(points=((0, 16), (32, 0), (64, 16), (32, 64))),))
    assert first_box_iou(prediction([quad], [grounded("a", 0, 0, 64, 64)])) == 1


def test_a_row_without_an_expected_box_has_no_score():
    assert first_box_iou(prediction([grounded("a", 0, 0, 1, 1)], ["a dog"])) is None
    assert BoxAccuracy().score(prediction([], ["a dog"])) is None
    assert GroundedAccuracy().score(prediction([], ["a dog"])) is None
    question = Conversation(id="a", turns=(Turn(role="user", parts=("Where?",)),))
    assert MeanIoU().score(Prediction(conversation=question, text="", parts=())) is None


def test_boxes_are_compared_relative_to_their_own_image():
    images = (ImageSource(Image.new("RGB", (10, 10))), ImageSource(Image.new("RGB", (200, 100))))
    right_half = GroundedObject(label="a", boxes=(Box(x0=100, y0=0, x1=200, y1=100),), image=1)
    turns = (Turn(role="user", parts=images), Turn(role="assistant", parts=(right_half,)))
    row = Conversation(id="a", turns=turns)
    predicted = grounded("a", 5, 0, 10, 10)  # of image 0: the markup cannot name the second one
    assert first_box_iou(Prediction(conversation=row, text="", parts=(predicted,))) == 1


def grounded_score(predicted: list[Part], expected: list[Part]) -> float | None:
    return GroundedAccuracy().score(prediction(predicted, expected))


DOG, CAT = grounded("dog", 0, 0, 32, 32), grounded("cat", 32, 32, 64, 64)


@pytest.mark.parametrize(
    ("predicted", "right"),
    [
        ([DOG, CAT], True),
        ([CAT, "and", DOG], True),
        ([grounded("dog", 0, 0, 30, 32), CAT], True),
        ([DOG], False),
        ([DOG, CAT, CAT], False),
        ([DOG, DOG], False),
        ([grounded("dog", 32, 32, 64, 64), grounded("cat", 0, 0, 32, 32)], False),
        ([GroundedObject(label="dog"), CAT], False),
        (["a dog and a cat"], False),
    ],
)
def test_every_object_needs_the_right_label_and_box(predicted, right):
    assert grounded_score(predicted, [DOG, CAT]) == right


def test_objects_with_the_same_label_are_paired_optimally():
    """The wide box matches both; a greedy pairing would leave the other one without a partner."""
    wide = grounded("a", 0, 0, 40, 10)
    left = grounded("a", 0, 0, 24, 10)
    right = grounded("a", 10, 0, 40, 10)
    assert grounded_score([wide, left], [left, right]) == 1
    assert grounded_score([wide, right], [left, right]) == 1


def test_one_object_with_two_boxes_equals_two_objects_with_one():
    boxes = (Box(x0=0, y0=0, x1=9, y1=9), Box(x0=20, y0=20, x1=29, y1=29))
    together = GroundedObject(label="cup", boxes=boxes)
    apart = [GroundedObject(label="cup", boxes=(box,)) for box in boxes]
    assert grounded_score([together], apart) == 1
    assert grounded_score([GroundedObject(label="cup ", boxes=boxes[:1])], apart) == 0
