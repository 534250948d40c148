"""Metrics for answers with boxes: IoU of the first box, and agreement of all objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qwenvl_lit.bounds import check_number
from qwenvl_lit.grounding import box_around, iou, object_in_frame
from qwenvl_lit.metrics.per_sample import Where
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Box, Conversation, GroundedObject, Part, Point, Prediction, Region

LabeledBox = tuple[str | None, Box | None]


def predicted_boxes(prediction: Prediction) -> list[LabeledBox]:
    """Returns the pairs of `labeled_boxes` for the answer."""
    return labeled_boxes(prediction.parts, prediction.conversation)


def expected_boxes(prediction: Prediction) -> list[LabeledBox]:
    """Returns the pairs of `labeled_boxes` for the expected answer."""
    expected = prediction.conversation.answer
    return labeled_boxes(expected.parts if expected else (), prediction.conversation)


def labeled_boxes(parts: Iterable[Part], conversation: Conversation) -> list[LabeledBox]:
    """Returns (label, box) for each box of each object in reading order.

    An object without boxes gives one pair, with None as its box. A quad or point is replaced by the
    smallest box around it. Boxes are in the unit frame of their image: markup cannot say to which
    of several images a box belongs, and in this frame the images' sizes make no difference. The IoU
    is the same as in pixels.
    """
    pairs: list[LabeledBox] = []
    for part in parts:
        if not isinstance(part, GroundedObject):
            continue
        label = part.label.strip() if part.label else None
        regions = object_in_frame(part, "unit", conversation.images).boxes
        for region in regions:
            pairs.append((label, box_around(region)))
        if not regions:
            pairs.append((label, None))
    return pairs


def first_box(pairs: Iterable[LabeledBox]) -> Box | None:
    """Returns the first box, or None if there is no box."""
    return next((box for _, box in pairs if box), None)


def first_box_iou(prediction: Prediction) -> float | None:
    """Returns the IoU of the first predicted box with the first expected box.

    Returns 0 if the answer has no box, and None if the expected answer has no box or a point, which
    no box overlaps.
    """
    expected = first_box(expected_boxes(prediction))
    if expected is None or expects_points(prediction):
        return None
    predicted = first_box(predicted_boxes(prediction))
    if predicted is None:
        return 0.0
    return iou(predicted, expected)


def expects_points(prediction: Prediction) -> bool:
    """Returns whether the expected answer has a point."""
    expected = prediction.conversation.answer
    return expected is not None and has_points(expected.parts)


def has_points(parts: Iterable[Part]) -> bool:
    """Returns whether an answer has an object with a point."""
    regions: list[Region] = []
    for part in parts:
        if isinstance(part, GroundedObject):
            regions += part.boxes
    return any(isinstance(region, Point) for region in regions)


def have_same_objects(
    predicted: Sequence[LabeledBox], expected: Sequence[LabeledBox], threshold: float
) -> bool:
    """Returns whether both sequences name the same objects, in any order.

    They do if the objects can be matched one to one such that matched objects have equal labels and
    their boxes have an IoU of at least `threshold`.

    >>> box = Box(x0=0, y0=0, x1=1, y1=1, frame="unit")
    >>> have_same_objects([("cat", box), ("dog", None)], [("dog", None), ("cat", box)], 0.5)
    True
    """
    if len(predicted) != len(expected):
        return False
    predicted_of: dict[int, int] = {}  # index in `expected` -> matched index in `predicted`

    def find_partner(index: int, tried: set[int]) -> bool:
        """Matches a predicted object and, if necessary, changes earlier matches (Kuhn 1955)."""
        for candidate, wanted in enumerate(expected):
            if candidate in tried or not _matches(predicted[index], wanted, threshold):
                continue
            tried.add(candidate)
            is_free = candidate not in predicted_of
            if is_free or find_partner(predicted_of[candidate], tried):
                predicted_of[candidate] = index
                return True
        return False

    return all(find_partner(index, set()) for index in range(len(predicted)))


def _matches(predicted: LabeledBox, expected: LabeledBox, threshold: float) -> bool:
    """Returns whether labels are equal and the boxes overlap enough or are both missing."""
    predicted_label, predicted_box = predicted
    expected_label, expected_box = expected
    if predicted_label != expected_label:
        return False
    if predicted_box is None or expected_box is None:
        return predicted_box is expected_box
    return iou(predicted_box, expected_box) >= threshold


class MeanIoU(SampleMean):
    """Mean IoU of the first predicted box with the first expected box; 0 for answers without a box.

    Each row has the same weight, as in the "mIoU" of referring expression comprehension. It is not
    a mean over classes.
    """

    needs = "expected box"

    def score(self, prediction: Prediction) -> float | None:
        return first_box_iou(prediction)


class BoxAccuracy(SampleMean):
    """Acc@IoU: fraction of rows whose first predicted box overlaps the first expected box enough.

    This is the metric of RefCOCO, RefCOCO+ and RefCOCOg (Mao et al., CVPR 2016).

    Args:
        threshold: the lowest IoU that counts as correct. An IoU equal to it is correct, as in
            `eval_mm/evaluate_grounding.py` of Qwen-VL.
    """

    needs = "expected box"

    def __init__(self, threshold: float = 0.5, *, where: Where | None = None):
        super().__init__(where=where)
        check_number("threshold", threshold, least=0, most=1)
        self.threshold = threshold

    def score(self, prediction: Prediction) -> float | None:
        overlap = first_box_iou(prediction)
        if overlap is None:
            return None
        return float(overlap >= self.threshold)


class GroundedAccuracy(SampleMean):
    """Fraction of rows whose answer has every expected object with its box, and no other object.

    Objects are compared as a multiset of (label, box), in any order. Labels must be equal, except
    for white space around them. This project defines the metric for answers with several objects.
    Acc@IoU considers the first box only, and average precision requires confidences, which
    generated text does not have.

    Args:
        threshold: the lowest IoU at which a box counts as correct.
    """

    needs = "expected object"

    def __init__(self, threshold: float = 0.5, *, where: Where | None = None):
        super().__init__(where=where)
        check_number("threshold", threshold, least=0, most=1)
        self.threshold = threshold

    def score(self, prediction: Prediction) -> float | None:
        expected = expected_boxes(prediction)
        if not expected or expects_points(prediction):
            return None
        return float(have_same_objects(predicted_boxes(prediction), expected, self.threshold))
