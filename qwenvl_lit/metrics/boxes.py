"""Scores of grounded answers: is the box right, and are all objects found?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qwenvl_lit.grounding import iou, object_in_frame
from qwenvl_lit.metrics.sample_mean import SampleMean
from qwenvl_lit.types import Box, Conversation, GroundedObject, Part, Prediction, Quad

LabelledBox = tuple[str | None, Box | None]


def labelled_boxes(parts: Iterable[Part], conversation: Conversation) -> list[LabelledBox]:
    """Label and box of each object among `parts`, in reading order: one pair a box, or one with None for an object without any.

    Boxes are in shares of the sides of their image: the IoU is that in pixels, and answers in markup that cannot say which of several
    images it means are compared all the same. A quad becomes the smallest box around it.
    """
    pairs: list[LabelledBox] = []
    for part in parts:
        if isinstance(part, GroundedObject):
            label = part.label.strip() if part.label else None
            boxes = object_in_frame(part, "unit", conversation.images).boxes
            pairs += [(label, _around(box)) for box in boxes] or [(label, None)]
    return pairs


def _around(region: Box | Quad) -> Box:
    if isinstance(region, Box):
        return region
    xs, ys = zip(*region.points, strict=True)
    return Box(x0=min(xs), y0=min(ys), x1=max(xs), y1=max(ys), frame=region.frame)


def first_box_iou(prediction: Prediction) -> float | None:
    """IoU of the first predicted box with the first box of the expected answer: 0 without a predicted, None without an expected one."""
    answer = prediction.conversation.answer
    expected = [
        box
        for _, box in labelled_boxes(answer.parts if answer else (), prediction.conversation)
        if box
    ]
    if not expected:
        return None
    predicted = [box for _, box in labelled_boxes(prediction.parts, prediction.conversation) if box]
    return iou(predicted[0], expected[0]) if predicted else 0.0


def same_objects(
    predicted: Sequence[LabelledBox], expected: Sequence[LabelledBox], threshold: float
) -> bool:
    """Whether both name the same objects: a one-to-one pairing exists with equal labels and an IoU of at least `threshold` in each pair.

    >>> box = Box(x0=0, y0=0, x1=1, y1=1, frame="unit")
    >>> same_objects([("cat", box), ("dog", None)], [("dog", None), ("cat", box)], 0.5)
    True
    """

    def alike(a: LabelledBox, b: LabelledBox) -> bool:
        if a[0] != b[0] or (a[1] is None) != (b[1] is None):
            return False
        return a[1] is None or b[1] is None or iou(a[1], b[1]) >= threshold

    partner: dict[int, int] = {}  # place in `expected` -> place in `predicted`

    def pair(place: int, tried: set[int]) -> bool:
        """Find a partner for a predicted object, moving earlier ones to another where that helps (augmenting paths, Kuhn 1955)."""
        for other, wanted in enumerate(expected):
            if other not in tried and alike(predicted[place], wanted):
                tried.add(other)
                if other not in partner or pair(partner[other], tried):
                    partner[other] = place
                    return True
        return False

    return len(predicted) == len(expected) and all(
        pair(place, set()) for place in range(len(predicted))
    )


class MeanIoU(SampleMean):
    """Mean IoU of the first predicted box with the first expected one; an answer without a box counts 0.

    Each row weighs the same, as "mIoU" of referring expression comprehension; it is no mean over classes.
    """

    needs = "expected box"

    def score(self, prediction: Prediction) -> float | None:
        return first_box_iou(prediction)


class BoxAccuracy(SampleMean):
    """Acc@IoU: share of rows whose first predicted box has an IoU of at least `threshold` with the first expected one.

    The measure of RefCOCO, RefCOCO+ and RefCOCOg (Mao et al., CVPR 2016), with >= as in `eval_mm/evaluate_grounding.py` of Qwen-VL.
    """

    needs = "expected box"

    def __init__(
        self, threshold: float = 0.5, *, where: Mapping[str, str | Sequence[str]] | None = None
    ):
        super().__init__(where=where)
        self.threshold = threshold

    def score(self, prediction: Prediction) -> float | None:
        overlap = first_box_iou(prediction)
        return None if overlap is None else float(overlap >= self.threshold)


class GroundedAccuracy(SampleMean):
    """Share of rows whose answer names every expected object, no other, and boxes each with an IoU of at least `threshold`.

    Objects are compared as a multiset of (label, box), in any order; labels exactly, but for white space around them. Our own measure for
    answers with several objects: Acc@IoU looks at the first box alone, and average precision needs confidences, which text has none of.
    """

    needs = "expected object"

    def __init__(
        self, threshold: float = 0.5, *, where: Mapping[str, str | Sequence[str]] | None = None
    ):
        super().__init__(where=where)
        self.threshold = threshold

    def score(self, prediction: Prediction) -> float | None:
        answer = prediction.conversation.answer
        expected = labelled_boxes(answer.parts if answer else (), prediction.conversation)
        if not expected:
            return None
        return float(
            same_objects(
                labelled_boxes(prediction.parts, prediction.conversation), expected, self.threshold
            )
        )
