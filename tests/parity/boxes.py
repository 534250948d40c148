"""Boxes: between frames, in rows of ms-swift, in answers, and the IoU of two of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from parity import reasons
from parity.conversations import FRAMES, blank, golden_sample, opened, swift_sample
from parity.result import Result, read, same
from qwenvl_lit.grounding import iou, object_in_frame, objects_from_tags, to_frame
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.types import Box, GroundedObject, ImageSource, Quad

IOU = 1e-6  # recorded in float32


def normalize_bbox(path: Path) -> Iterator[Result]:
    for case in read(path)["cases"]:
        x0, y0, x1, y1 = case["bbox"]
        box = Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=FRAMES[case["bbox_type"]])
        moved = to_frame(box, FRAMES[case["to_type"]], size=tuple(case["size"]))
        ours = [moved.x0, moved.y0, moved.x1, moved.y1]
        if case["to_type"] == "real" != case["bbox_type"]:
            # ms-swift truncates pixels too. Ours keeps the fraction, for the IoU.
            ours = [int(value) for value in ours]
        name = json.dumps([case["size"], case["bbox"], case["bbox_type"], case["to_type"]])
        yield same(name, "boxes", ours, case["result"])


class AnswerBox(NamedTuple):
    """A box of an answer as the original reports it, and our box in pixels."""

    values: list[float]
    label: str | None
    in_pixels: Box


def boxes_of_answer(response: str, images: list[ImageSource]) -> Iterator[AnswerBox]:
    """Yields the boxes of an answer, without quadrilaterals, which the original ignores.

    A label belongs to the box right behind it, and to none if a quadrilateral is there.
    """
    for part in objects_from_tags(response, image=len(images) - 1):
        if not isinstance(part, GroundedObject):
            continue
        label = None if part.label is None else part.label.strip()
        on_image = object_in_frame(part, "pixel", images) if images else part
        for box, in_pixels in zip(part.boxes, on_image.boxes, strict=True):
            if not isinstance(box, Quad):
                yield AnswerBox([box.x0, box.y0, box.x1, box.y1], label, in_pixels)
            label = None


def response_boxes(path: Path) -> Iterator[Result]:
    """Compares labels and boxes of an answer, and their position on the last image.

    The original draws at x / 1000, in whole pixels.
    """
    data = read(path)
    for case in data["cases"]:
        name = f"{case['response']} after {case['history']}"
        history = filter(None, chain.from_iterable(case["history"]))
        paths = list(chain.from_iterable(re.findall("<img>(.*?)</img>", text) for text in history))
        images = [blank(file, data["image_sizes"]) for file in paths]
        found = list(boxes_of_answer(case["response"], images))
        boxes: list[dict[str, Any]] = []
        for box in found:
            boxes.append({"box": box.values})
            if box.label is not None:
                boxes[-1]["ref"] = box.label
        if not isinstance(case["boxes"], list):
            yield same(name, "boxes", boxes, case["boxes"], reasons.boxes_of_answer)
            continue
        yield same(name, "boxes", boxes, case["boxes"])
        drawn: list[list] = []
        sides = images[-1].size * 2 if images else ()
        for box in found if images else ():
            rectangle = [int(at / 1000 * side) for at, side in zip(box.values, sides, strict=True)]
            drawn.append(["box", rectangle])
            if box.label is not None:
                drawn.append(["text", box.label, rectangle[:2]])
        yield same(name, "rectangles", drawn or None, case["drawn"])
        yield same(name, "image", paths[-1] if paths else None, case["latest_picture"])
        for box in found if images else ():
            yield from _distances(name, box, sides)


def _distances(name: str, box: AnswerBox, sides: tuple[int, ...]) -> Iterator[Result]:
    ours = (box.in_pixels.x0, box.in_pixels.y0, box.in_pixels.x1, box.in_pixels.y1)
    for value, at, side in zip(ours, box.values, sides, strict=True):
        theirs = int(at / 1000 * side)
        reach = max(1, abs(theirs) / side)  # of a box that leaves its image
        allowed = 1 + reach * side / 999
        deviation = abs(value - theirs)
        yield Result(case=name, of="pixels of boxes", deviation=deviation, allowed=allowed)


def swift_objects(path: Path) -> Iterator[Result]:
    file = opened(path)
    processor = QwenVLProcessor(file.tokenizer, image_size=14)
    for case in file.data["cases"]:
        ours = swift_sample(processor, case, file.data["image_sizes"])
        golden = golden_sample(case, file.tokenizer)
        explain = partial(reasons.swift_sample, case, file.tokenizer)
        name = f"{case['name']} ({case['objects_form']})"
        yield same(name, "ids and labels", ours, golden, explain)


def image_sizes(path: Path) -> Iterator[Result]:
    """Compares the size of an image with the size in which the recorded boxes are measured."""
    file = path.relative_to(path.parent.parent).as_posix()
    sizes = read(path.parent.parent / "response_boxes.json")["image_sizes"]
    yield same(file, "size", list(ImageSource(path).size), sizes.get(file))


def _float32_error(box: Box) -> float:
    """Returns how far the IoU of a box may move if its corners are written in float32.

    This is the spacing of float32 at the corners, as a fraction of the sides.
    """
    error = 0.0
    for low, high in ((box.x0, box.x1), (box.y0, box.y1)):
        if low != high:
            error = max(error, 2 * max(abs(low), abs(high)) / abs(high - low))
    return 2**-23 * error


def first_box(answer: str) -> tuple[float, float, float, float]:
    """Returns the first `(x,y),(x,y)` of an answer; an empty box if it cannot be read."""
    match = re.search(r"\((.*?)\),\((.*?)\)", answer)
    try:
        x0, y0, x1, y1 = map(float, ",".join(match.groups()).split(",")) if match else (0, 0, 0, 0)
    except ValueError:  # words, or not four numbers: the published script takes an empty box
        return 0, 0, 0, 0
    return x0, y0, x1, y1


def grounding_iou(path: Path) -> Iterator[Result]:
    """Compares the IoU of the first box of an answer, and the fraction of answers above 0.5."""
    data, right = read(path), 0
    for case in data["cases"]:
        height, width = case["hw"]
        x0, y0, x1, y1 = first_box(case["answer"])
        on_grid = Box(x0=x0, y0=y0, x1=x1, y1=y1, frame="grid")
        predicted = to_frame(on_grid, "pixel", size=(width, height))
        x0, y0, x1, y1 = case["gt_bbox"]
        expected = Box(x0=x0, y0=y0, x1=x1, y1=y1)
        overlap = iou(predicted, expected)
        right += overlap >= 0.5
        name = f"{case['answer']} for {case['gt_bbox']}"
        theirs = float("nan") if case["iou"] is None else case["iou"]
        yield Result(
            case=name,
            of="IoU",
            deviation=abs(overlap - theirs),
            allowed=IOU + _float32_error(predicted) + _float32_error(expected),
            ours=overlap,
            reason=reasons.EMPTY_BOXES if case["iou"] is None and overlap == 0 else None,
        )
        yield same(name, "right", overlap >= 0.5, case["correct"])
    deviation = abs(right / data["n"] - data["precision_at_1"])
    yield Result(case="precision_at_1", of="accuracy", deviation=deviation, allowed=1e-9)


CHECKS = {
    "grounding/normalize_bbox.json": normalize_bbox,
    "grounding/response_boxes.json": response_boxes,
    "grounding/swift_objects.json": swift_objects,
    "grounding/img/*": image_sizes,
    "metrics/grounding_iou.json": grounding_iou,
}
