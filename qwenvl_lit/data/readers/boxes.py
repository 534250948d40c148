"""Boxes as rows write them: read, held against their image, and refused, kept or repaired where they are wrong."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from qwenvl_lit.grounding import GRID
from qwenvl_lit.types import Box, DataError, Dropped, Frame, GroundedObject, ImageSource, Quad

OnBadBox = Literal["error", "keep", "repair", "drop"]
FRAMES: dict[str | None, Frame] = {
    "real": "pixel",
    "norm_1000": "grid",
    "norm_1": "unit",
    None: "grid",
}  # `bbox_type` of ms-swift
LIMITS: dict[Frame, tuple[float, float]] = {
    "grid": (GRID, GRID),
    "unit": (1, 1),
}  # of pixels: the size of the image

_LARGEST = 1e9  # beyond it a number is no coordinate in any frame


class Boxes:
    """Reads the boxes of one row and decides what becomes of wrong ones; what it did is in `notes`.

    Args:
        on_bad_box: "error" refuses; "keep" takes them as they are, as the original does; "repair" puts corners in order, clips to the
            image and rounds fractions on the grid; "drop" has the row left out. What cannot be repaired or kept is refused.
    """

    def __init__(self, on_bad_box: OnBadBox = "error"):
        self.on_bad_box = on_bad_box
        self.notes: list[str] = []

    def fault(self, message: str) -> DataError:
        """What to raise for a fault that is neither kept nor repaired."""
        return Dropped(message) if self.on_bad_box == "drop" else DataError(message)

    def object(self, what: str, raw: Any) -> GroundedObject:
        """An entry of `objects`: a mapping, or a pair (caption, box on the grid)."""
        if isinstance(raw, list) and len(raw) == 2:
            raw = {"caption": raw[0], "bbox": raw[1], "bbox_type": None}
        if not isinstance(raw, dict) or not _is_frame(raw.get("bbox_type", 0)):
            raise DataError(
                f"{what} is {{caption, bbox, bbox_type: real, norm_1000 or norm_1, image}}, got {reprlib.repr(raw)}"
            )
        label, image, values = raw.get("caption"), raw.get("image"), raw.get("bbox")
        if (
            not isinstance(label, str | None)
            or not isinstance(image, int | None)
            or isinstance(image, bool)
        ):
            raise DataError(
                f"{what}: `caption` is text and `image` a number, got {reprlib.repr(label)} and {reprlib.repr(image)}"
            )
        nested = (
            values
            if isinstance(values, list) and values and isinstance(values[0], list)
            else [values]
        )
        boxes = tuple(
            self._box(f"{what} ({reprlib.repr(label)})", box, FRAMES[raw["bbox_type"]])
            for box in nested
        )
        return GroundedObject(label=label, boxes=boxes, image=image or 0)

    def _box(self, what: str, values: Any, frame: Frame) -> Box:
        if not isinstance(values, list) or len(values) != 4 or not all(map(_is_coordinate, values)):
            raise self.fault(
                f"{what}: `bbox` is [x1, y1, x2, y2] or a list of such, got {reprlib.repr(values)}"
            )
        return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame=frame)

    def settled(
        self, what: str, thing: GroundedObject, images: Sequence[ImageSource]
    ) -> GroundedObject:
        """`thing` with boxes that are right, or as right as `on_bad_box` asks.

        Raises:
            DataError: its image does not exist or cannot be measured, or a box is wrong and not kept.
        """
        if not 0 <= thing.image < len(images):
            raise self.fault(
                f"{what} is in `image` {thing.image}, counted from 0, but the row has {len(images)} images"
            )
        boxes = tuple(
            self.settled_box(what, box, LIMITS.get(box.frame) or images[thing.image].size)
            for box in thing.boxes
        )
        return thing if boxes == thing.boxes else replace(thing, boxes=boxes)

    def settled_box(self, what: str, box: Box | Quad, limits: tuple[float, float]) -> Box | Quad:
        """As `settled`, for one box within (0, 0) and `limits`."""
        if not (fault := _fault(box, limits)):
            return box
        written = [list(corner) for corner in _corners(box)]
        if self.on_bad_box == "keep":
            self.notes.append(f"{what}: box {written} {fault}; kept as it is")
            return box
        if self.on_bad_box == "repair":
            repaired = _repaired(box, limits)
            if repaired is None:
                raise DataError(
                    f"{what}: box {written} {fault}, and nothing of it is within its image, so it cannot be repaired"
                )
            self.notes.append(
                f"{what}: box {written} {fault}; repaired to {[list(corner) for corner in _corners(repaired)]}"
            )
            return repaired
        if self.on_bad_box == "drop":
            raise Dropped(f"{what}: box {written} {fault}")
        raise DataError(
            f"{what}: box {written} {fault}; correct it, or choose what becomes of such boxes by data.on_bad_box"
        )


def _is_frame(kind: Any) -> bool:
    return isinstance(kind, str | None) and kind in FRAMES


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # false for NaN, too


def _corners(box: Box | Quad) -> tuple[tuple[float, float], ...]:
    return box.points if isinstance(box, Quad) else ((box.x0, box.y0), (box.x1, box.y1))


def _fault(box: Box | Quad, limits: tuple[float, float]) -> str:
    """What is wrong with a box, as the end of a sentence; empty if nothing is."""
    corners = _corners(box)
    if box.frame == "grid" and any(value != int(value) for corner in corners for value in corner):
        return f"has fractions on the grid of 0..{GRID}"
    if isinstance(box, Box) and (box.x0 > box.x1 or box.y0 > box.y1):
        return "has its corners in the wrong order; the top left one comes first"
    if any(not 0 <= x <= limits[0] or not 0 <= y <= limits[1] for x, y in corners):
        return f"is not within its image, (0, 0) to {limits} in its frame"
    return ""


def _repaired(box: Box | Quad, limits: tuple[float, float]) -> Box | Quad | None:
    """None if clipping leaves nothing of a side."""
    sides = []
    for values, limit in zip(zip(*_corners(box), strict=True), limits, strict=True):
        before = [round(value) for value in values] if box.frame == "grid" else list(values)
        if isinstance(box, Box):
            before.sort()
        after = [min(max(value, 0), limit) for value in before]
        if max(after) == min(after) and after != before:
            return None
        sides.append(after)
    if isinstance(box, Quad):
        return Quad(points=tuple(zip(*sides, strict=True)), frame=box.frame)
    (x0, x1), (y0, y1) = sides
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=box.frame)
