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
    left = grounded("half", 0, 0, 32, 64)
    assert first_box_iou(prediction([left], [grounded("half", 0, 0, 0.5, 1, frame="unit")])) == 1
    assert (
        first_box_iou(prediction([left], [grounded("half", 0, 0, 999, 999, frame="grid")])) == 0.5
    )
    assert first_box_iou(prediction([left], [grounded("half", 0, 0, 64, 64)])) == 0.5


def test_only_the_first_box_counts():
    right_second = [grounded("a", 0, 0, 1, 1), grounded("b", 0, 0, 64, 64)]
    assert (
        first_box_iou(prediction(right_second, [grounded("b", 32, 32, 64, 64), *right_second])) == 0
    )


def test_accuracy_takes_the_threshold_itself_as_right():
    rows = [
        prediction([grounded("a", 0, 0, 32, 64)], [grounded("a", 0, 0, 64, 64)], 0),  # IoU 0.5
        prediction([grounded("a", 0, 0, 31, 64)], [grounded("a", 0, 0, 64, 64)], 1),
        prediction(["no box"], [grounded("a", 0, 0, 64, 64)], 2),
        prediction([grounded("a", 0, 0, 64, 64)], [grounded("a", 0, 0, 64, 64)], 3),
    ]
    accuracy, strict, mean = BoxAccuracy(), BoxAccuracy(0.75), MeanIoU()
    for metric in (accuracy, strict, mean):
        metric.update(rows)
    assert accuracy.compute() == 0.5
    assert strict.compute() == 0.25
    assert mean.compute() == pytest.approx((0.5 + 31 / 64 + 0 + 1) / 4)


def test_inverted_boxes_score_nothing():
    assert (
        first_box_iou(prediction([grounded("a", 64, 64, 0, 0)], [grounded("a", 0, 0, 64, 64)])) == 0
    )


def test_a_quad_counts_as_the_box_around_it():
    quad = GroundedObject(label="a", boxes=(Quad(points=((0, 16), (32, 0), (64, 16), (32, 64))),))
    assert first_box_iou(prediction([quad], [grounded("a", 0, 0, 64, 64)])) == 1


def test_a_row_whose_answer_has_no_box_has_no_score():
    assert first_box_iou(prediction([grounded("a", 0, 0, 1, 1)], ["a dog"])) is None
    assert BoxAccuracy().score(prediction([], ["a dog"])) is None
    assert GroundedAccuracy().score(prediction([], ["a dog"])) is None
    asked = Conversation(id="a", turns=(Turn(role="user", parts=("Where?",)),))
    assert MeanIoU().score(Prediction(conversation=asked, text="", parts=())) is None


def test_boxes_are_compared_within_their_image_whichever_it_is():
    images = (ImageSource(Image.new("RGB", (10, 10))), ImageSource(Image.new("RGB", (200, 100))))
    right_half = GroundedObject(label="a", boxes=(Box(x0=100, y0=0, x1=200, y1=100),), image=1)
    row = Conversation(
        id="a", turns=(Turn(role="user", parts=images), Turn(role="assistant", parts=(right_half,)))
    )
    said = grounded("a", 5, 0, 10, 10)  # of image 0: the markup had no word for the second
    assert first_box_iou(Prediction(conversation=row, text="", parts=(said,))) == 1


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
def test_every_object_has_to_be_named_and_boxed_right(predicted, right):
    assert grounded_score(predicted, [DOG, CAT]) == right


def test_objects_of_one_name_are_paired_as_well_as_they_can_be():
    """The first prediction fits both; taking the first that fits would leave the second without a partner."""
    wide, left, right = (
        grounded("a", 0, 0, 40, 10),
        grounded("a", 0, 0, 24, 10),
        grounded("a", 10, 0, 40, 10),
    )
    assert grounded_score([wide, left], [left, right]) == 1
    assert grounded_score([wide, right], [left, right]) == 1


def test_boxes_may_stand_under_one_label_or_several():
    boxes = (Box(x0=0, y0=0, x1=9, y1=9), Box(x0=20, y0=20, x1=29, y1=29))
    together = GroundedObject(label="cup", boxes=boxes)
    apart = [GroundedObject(label="cup", boxes=(box,)) for box in boxes]
    assert grounded_score([together], apart) == 1
    assert grounded_score([GroundedObject(label="cup ", boxes=boxes[:1])], apart) == 0
