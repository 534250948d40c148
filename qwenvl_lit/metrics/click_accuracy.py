"""Click accuracy: whether the point of an answer lies in the expected box."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwenvl_lit.grounding import center, object_in_frame
from qwenvl_lit.metrics.boxes import expected_boxes, expects_points, first_box
from qwenvl_lit.metrics.sample_mean import ProtocolMean
from qwenvl_lit.types import Box, Conversation, GroundedObject, Part, Point, Prediction


def clicked_point(parts: Iterable[Part], conversation: Conversation) -> Point | None:
    """Returns the first point or center of a box, in the unit frame; None if there is none."""
    for part in parts:
        if isinstance(part, GroundedObject) and part.boxes:
            return center(object_in_frame(part, "unit", conversation.images).boxes[0])
    return None


def clicked_point_official(text: str) -> Point | None:
    """Returns the point that SeeClick's `screenspot_test.py` finds in an answer.

    With "box" in the answer, it is the center of the first `<box>` without blanks, divided by 1000.
    Otherwise it is made of all numbers of the answer, if these are two or four.

    >>> clicked_point_official("(0.17,0.06)")
    Point(x=0.17, y=0.06, frame='unit')
    """
    if "box" in text:
        tag = re.search(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>", text)
        values = [int(value) / 1000 for value in tag.groups()] if tag else []
    else:
        values = [float(value) for value in re.findall(r"-?\d+\.?\d*", text)]
    if len(values) == 2:
        return Point(x=values[0], y=values[1], frame="unit")
    if len(values) == 4:
        return Point(x=(values[0] + values[2]) / 2, y=(values[1] + values[3]) / 2, frame="unit")
    return None


def lies_in(point: Point, box: Box) -> bool:
    """Returns whether a point lies in a box of the same frame, or on its edge.

    >>> lies_in(Point(x=2, y=1), Box(x0=0, y0=0, x1=2, y1=2))
    True
    """
    return box.x0 <= point.x <= box.x1 and box.y0 <= point.y <= box.y1


class ClickAccuracy(ProtocolMean):
    """Fraction of rows whose first point, or center of the first box, lies in the expected box.

    This is the metric of ScreenSpot (Cheng et al., ACL 2024). An answer without a point is wrong.
    """

    needs = "expected box"

    def score(self, prediction: Prediction) -> float | None:
        expected = first_box(expected_boxes(prediction))
        if expected is None or expects_points(prediction):
            return None
        if self.protocol == "official":
            point = clicked_point_official(prediction.text)
        else:
            point = clicked_point(prediction.parts, prediction.conversation)
        return float(point is not None and lies_in(point, expected))
