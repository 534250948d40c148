"""Reads the boxes of a row, checks them against their image, and rejects, keeps or repairs them."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

from qwenvl_lit.data.image_notes import rotation_note
from qwenvl_lit.data.readers.spelling import did_you_mean, meant
from qwenvl_lit.grounding import GRID
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import (
    Box,
    DataError,
    Dropped,
    Frame,
    GroundedObject,
    ImageSource,
    Point,
    Quad,
    Region,
)

OnBadBox = Literal["error", "keep", "repair", "drop"]
# The values of ms-swift's key `bbox_type`.
FRAME_OF_BBOX_TYPE: dict[str | None, Frame] = {
    "real": "pixel",
    "norm_1000": "grid",
    "norm_1": "unit",
    None: "grid",
}
_OBJECT_KEYS = ("caption", "bbox", "bbox_type", "image")
# The largest x and y in a frame. In the pixel frame they are the size of the image.
FRAME_LIMITS: dict[Frame, tuple[float, float]] = {"grid": (GRID, GRID), "unit": (1, 1)}

CORNERS = "[left, top, right, bottom]"  # what the numbers of a box are
_OUTSIDE = "is not within its image"
_MAX_COORDINATE = 1e9  # no coordinate in any frame is larger
_SMALL_PX = 4  # in an image of at most this size, a box of pixels may lie within 0..1


class BoxReader:
    """Reads the boxes of one row and handles invalid ones; `notes` lists what it kept or repaired.

    Args:
        on_bad_box: "error" raises; "keep" keeps invalid boxes, as ms-swift does; "repair" sorts the
            corners, clips to the image and rounds fractions on the grid; "drop" raises `Dropped`,
            so that the row is left out. Boxes that cannot be kept or repaired raise.
    """

    def __init__(self, on_bad_box: OnBadBox = "error"):
        self.on_bad_box = on_bad_box
        self.notes: list[str] = []

    def error(self, message: str) -> DataError:
        """Returns the exception to raise for a box that can be neither kept nor repaired."""
        return Dropped(message) if self.on_bad_box == "drop" else DataError(message)

    def read_object(self, what: str, raw: Any) -> GroundedObject:
        """Reads an entry of `objects`: a mapping, or a pair (caption, box on the grid)."""
        if isinstance(raw, list) and len(raw) == 2:
            raw = {"caption": raw[0], "bbox": raw[1], "bbox_type": None}
        if not isinstance(raw, dict):
            raise DataError(
                f"{what} must be {{caption, bbox, bbox_type: real, norm_1000 or norm_1, image}}, "
                f"got {reprlib.repr(raw)}"
            )
        _check_object_keys(what, raw)
        label, image, values = raw.get("caption"), raw.get("image"), raw.get("bbox")
        is_index = isinstance(image, int | None) and not isinstance(image, bool)
        if not isinstance(label, str | None) or not is_index:
            raise DataError(
                f"{what}: `caption` must be text and `image` a number, "
                f"got {reprlib.repr(label)} and {reprlib.repr(image)}"
            )
        if values != [] and not (isinstance(values, list) and isinstance(values[0], list)):
            values = [values]  # a single box; an object with no box is only a caption
        what = f"{what} ({reprlib.repr(label)})"
        frame = FRAME_OF_BBOX_TYPE[raw["bbox_type"]]
        boxes = tuple(self._read_box(what, corners, frame) for corners in values)
        return GroundedObject(label=label, boxes=boxes, image=image or 0)

    def _read_box(self, what: str, values: Any, frame: Frame) -> Box | Point:
        is_list = isinstance(values, list) and len(values) in (2, 4)
        if not is_list or not all(map(_is_coordinate, values)):
            raise self.error(
                f"{what}: `bbox` must be [x1, y1, x2, y2], the [x, y] of a point, or a list of "
                f"these, got {reprlib.repr(values)}"
            )
        if len(values) == 2:
            return Point(x=values[0], y=values[1], frame=frame)
        return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame=frame)

    def check_object(
        self, what: str, obj: GroundedObject, images: Sequence[ImageSource]
    ) -> GroundedObject:
        """Returns `obj` with its boxes checked, and kept or repaired as `on_bad_box` says.

        Raises:
            DataError: its image does not exist or cannot be measured, or a box is invalid and
                neither kept nor repaired.
        """
        if not 0 <= obj.image < len(images):
            raise self.error(
                f"{what} is in `image` {obj.image}, counted from 0, but the row has "
                f"{counted(len(images), 'image')}"
            )
        boxes = []
        for box in obj.boxes:
            image = images[obj.image]
            limits = FRAME_LIMITS.get(box.frame) or image.size
            try:
                boxes.append(self.check_box(what, box, limits))
            except DataError as error:
                if box.frame == "pixel" and _is_rotated(image):
                    note = rotation_note(image.header)
                    raise type(error)(f"{error}; image {image.name} {note}") from None
                raise
        return replace(obj, boxes=tuple(boxes))

    def check_fractions(
        self, objects: Sequence[GroundedObject], images: Sequence[ImageSource]
    ) -> None:
        """Checks that boxes in pixels are not fractions of the image whose frame was not given.

        Boxes are taken for fractions if all in pixels are within 0..1, and one is not of whole
        numbers.

        Raises:
            DataError: they are. With `on_bad_box="keep"` they are only noted.
        """
        boxes = []
        for obj in objects:
            boxes += [(obj, box) for box in obj.boxes if box.frame == "pixel"]
        values = [value for _, box in boxes for value in chain(*_corners(box))]
        if not values or max(values) > 1 or min(values) < 0 or all(map(_is_whole, values)):
            return
        for obj, box in boxes:
            width, height = images[obj.image].size
            if max(width, height) > _SMALL_PX and not all(map(_is_whole, chain(*_corners(box)))):
                break
        else:
            return
        problem = (
            f"object {objects.index(obj) + 1} ({reprlib.repr(obj.label)}): box "
            f"{_corner_lists(box)} is read as pixels of an image of {width} x {height}, and all "
            f"boxes of the row are within 0..1"
        )
        if self.on_bad_box == "keep":
            self.notes.append(f"{problem}; kept as it is")
            return
        raise self.error(
            f"{problem}; if they are fractions of the image, their entry of `objects` needs "
            f'"bbox_type": "norm_1". A `bbox` outside of `objects` must be in pixels'
        )

    def check_box(self, what: str, box: Region, limits: tuple[float, float]) -> Region:
        """Like `check_object`, for one box that must lie within (0, 0) and `limits`."""
        problem = _problem_with(box, limits)
        if not problem:
            return box
        description = f"{what}: box {_corner_lists(box)} {problem}"
        match self.on_bad_box:
            case "keep":
                self.notes.append(f"{description}; kept as it is")
                return box
            case "repair":
                if box.frame == "grid" and _is_within_one(box):
                    raise DataError(
                        f"{description} and is within 0..1: a box in markup is on the grid, so "
                        f"multiply fractions of the image by {GRID + 1}"
                    )
                repaired = _repaired(box, limits)
                if repaired is None:
                    raise DataError(
                        f"{description}, and no part of it is within its image, so it cannot be "
                        f"repaired"
                    )
                self.notes.append(f"{description}; repaired to {_corner_lists(repaired)}")
                return repaired
            case "drop":
                raise Dropped(description)
        largest = max(chain(*_corners(box)))
        advice = "correct it, or choose data.on_bad_box=keep, repair or drop"
        if problem.startswith(_OUTSIDE) and limits == FRAME_LIMITS["grid"] and largest == GRID + 1:
            advice = f"data.on_bad_box=repair writes {GRID + 1} as {GRID}, the end of the grid"
        elif isinstance(box, Box) and box.frame == "pixel" and _may_have_size(box, limits):
            advice = f"`bbox` is {CORNERS}: is this one x, y, width, height, as in COCO? {advice}"
        raise DataError(f"{description}; {advice}")


def _is_rotated(image: ImageSource) -> bool:
    return image.options.exif == "ignore" and image.header.orientation > 1


def _check_object_keys(what: str, raw: dict[str, Any]) -> None:
    absent = [key for key in _OBJECT_KEYS if key not in raw]
    for key in raw.keys() - _OBJECT_KEYS:
        if near := meant(key, absent):
            raise DataError(f"{what} has the key {key!r:.60}; did you mean `{near}`?")
    bbox_type = raw.get("bbox_type", "")
    if not isinstance(bbox_type, str | None) or bbox_type not in FRAME_OF_BBOX_TYPE:
        names = [name for name in FRAME_OF_BBOX_TYPE if name is not None]
        found = f"got {bbox_type!r:.60}" if "bbox_type" in raw else "which is missing"
        raise DataError(
            f"{what}: `bbox_type` must be real (pixels), norm_1000 (0..{GRID}) or norm_1 (0..1), "
            f"{found}{did_you_mean(bbox_type, names)}"
        )


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_COORDINATE  # also false for NaN


def _is_whole(value: float) -> bool:
    return value == int(value)


def _is_within_one(box: Region) -> bool:
    """Returns whether a box seems to be fractions of its image."""
    values = list(chain(*_corners(box)))
    return min(values) >= 0 and max(values) <= 1 and not all(map(_is_whole, values))


def _corners(box: Region) -> tuple[tuple[float, float], ...]:
    match box:
        case Quad():
            return box.points
        case Point():
            return ((box.x, box.y),)
    return (box.x0, box.y0), (box.x1, box.y1)


def _corner_lists(box: Region) -> list[list[float]]:
    return [list(corner) for corner in _corners(box)]


def _problem_with(box: Region, limits: tuple[float, float]) -> str:
    """Returns what is wrong with a box, as a predicate; empty if the box is valid."""
    corners = _corners(box)
    if box.frame == "grid" and not all(map(_is_whole, chain(*corners))):
        return f"has fractions on the grid of 0..{GRID}"
    if isinstance(box, Box) and (box.x0 > box.x1 or box.y0 > box.y1):
        return "has its corners in the wrong order; the top left one comes first"
    if any(not 0 <= x <= limits[0] or not 0 <= y <= limits[1] for x, y in corners):
        if box.frame == "pixel":
            return f"{_OUTSIDE}, which has {limits[0]} x {limits[1]} pixels"
        return f"{_OUTSIDE}, (0, 0) to {limits} in its frame"
    return ""


def _may_have_size(box: Box, limits: tuple[float, float]) -> bool:
    """Returns whether a box that is wrong as corners would be valid as x, y, width, height."""
    is_within = box.x0 + box.x1 <= limits[0] and box.y0 + box.y1 <= limits[1]
    return is_within and min(*chain(*_corners(box))) >= 0 and box.x1 > 0 and box.y1 > 0


def _repaired(box: Region, limits: tuple[float, float]) -> Region | None:
    """Returns the box sorted, clipped and rounded; None if clipping leaves no width or height.

    A point is only rounded; None if it is outside.
    """
    axes = []
    for values, limit in zip(zip(*_corners(box), strict=True), limits, strict=True):
        before = [*map(round, values)] if box.frame == "grid" else list(values)
        if isinstance(box, Box):
            before.sort()
        after = [min(max(value, 0), limit) for value in before]
        if max(after) == min(after) and after != before:
            return None
        axes.append(after)
    if isinstance(box, Quad):
        return Quad(points=tuple(zip(*axes, strict=True)), frame=box.frame)
    if isinstance(box, Point):
        return Point(x=axes[0][0], y=axes[1][0], frame=box.frame)
    (x0, x1), (y0, y1) = axes
    return Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=box.frame)
