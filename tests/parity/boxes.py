"""Boxes: between frames, in rows of ms-swift, in answers; and how well two of them agree."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from parity.conversations import FRAMES, blank, golden_sample, opened, swift_sample
from parity.result import Result, read, same
from qwenvl_lit.grounding import iou, object_in_frame, objects_from_tags, to_frame
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.types import Box, GroundedObject, ImageSource

IOU = 1e-6  # recorded in float32


def normalize_bbox(path: Path) -> Iterator[Result]:
    for case in read(path)["cases"]:
        x0, y0, x1, y1 = case["bbox"]
        box = Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=FRAMES[case["bbox_type"]])
        moved = to_frame(box, FRAMES[case["to_type"]], size=tuple(case["size"]))
        ours = [moved.x0, moved.y0, moved.x1, moved.y1]
        if case["to_type"] == "real" != case["bbox_type"]:
            ours = [
                int(value) for value in ours
            ]  # ms-swift cuts pixels too; we keep the fraction, for the IoU
        yield same(
            json.dumps([case["size"], case["bbox"], case["bbox_type"], case["to_type"]]),
            "boxes",
            ours,
            case["result"],
        )


def response_boxes(path: Path) -> Iterator[Result]:
    """Labels and boxes of an answer; and where they are on the last image, which the original draws at x / 1000, in whole pixels."""
    data = read(path)
    for case in data["cases"]:
        name = f"{case['response']} after {case['history']}"
        paths = [
            found
            for text in chain.from_iterable(case["history"])
            for found in re.findall("<img>(.*?)</img>", text)
        ]
        images = [blank(found, data["image_sizes"]) for found in paths]
        boxes: list[dict[str, Any]] = []
        drawn: list[list] = []
        pixels: list[tuple[Box, list[int]]] = []
        for part in objects_from_tags(case["response"], image=len(images) - 1):
            if not isinstance(part, GroundedObject) or not any(
                isinstance(box, Box) for box in part.boxes
            ):
                continue
            label = None if part.label is None else part.label.strip()
            on_image = object_in_frame(part, "pixel", images).boxes if images else part.boxes
            for box, in_pixels in zip(part.boxes, on_image, strict=True):
                boxes.append(
                    {"box": [box.x0, box.y0, box.x1, box.y1]}
                    | ({} if label is None else {"ref": label})
                )
                if images:
                    width, height = images[-1].size
                    rectangle = [
                        int(at / 1000 * side)
                        for at, side in zip(boxes[-1]["box"], (width, height) * 2, strict=True)
                    ]
                    drawn += [["box", rectangle]] + (
                        [] if label is None else [["text", label, rectangle[:2]]]
                    )
                    pixels.append((in_pixels, rectangle))
                label = None  # the original gives a label to the first of its boxes
        yield same(name, "boxes", boxes, case["boxes"])
        if isinstance(case["boxes"], list):
            yield same(name, "rectangles", drawn or None, case["drawn"])
            yield same(name, "image", paths[-1] if paths else None, case["latest_image"])
        for box, rectangle in pixels:
            for ours, theirs, side in zip(
                (box.x0, box.y0, box.x1, box.y1), rectangle, (width, height) * 2, strict=True
            ):
                reach = max(1, abs(theirs) / side)  # of a box that leaves its image
                yield Result(
                    case=name,
                    of="pixels of boxes",
                    deviation=abs(ours - theirs),
                    allowed=1 + reach * side / 999,
                )


def swift_objects(path: Path) -> Iterator[Result]:
    file = opened(path)
    processor = QwenVLProcessor(file.tokenizer, image_size=14)
    for case in file.data["cases"]:
        ours = swift_sample(processor, case, file.data["image_sizes"])
        yield same(
            f"{case['name']} ({case['objects_form']})",
            "ids and labels",
            ours,
            golden_sample(case, file.tokenizer),
        )


def image_sizes(path: Path) -> Iterator[Result]:
    """An image has the size that the recorded boxes are measured in."""
    file = path.relative_to(path.parent.parent).as_posix()
    yield same(
        file,
        "size",
        list(ImageSource(path).size),
        read(path.parent.parent / "response_boxes.json")["image_sizes"].get(file),
    )


def _float32_error(box: Box) -> float:
    """How far the IoU of a box may move by writing its corners in float32: their steps, as shares of its sides."""
    sides = ((box.x0, box.x1), (box.y0, box.y1))
    return 2**-23 * max(
        (2 * max(map(abs, side)) / abs(side[1] - side[0]) for side in sides if side[0] != side[1]),
        default=0,
    )


def grounding_iou(path: Path) -> Iterator[Result]:
    """The IoU of the first `(x,y),(x,y)` of an answer, and its share at 0.5."""
    data, right = read(path), 0
    for case in data["cases"]:
        height, width = case["hw"]
        first = re.search(r"\((.*?)\),\((.*?)\)", case["answer"])
        try:
            x0, y0, x1, y1 = (
                (float(value) for value in ",".join(first.groups()).split(","))
                if first
                else (0, 0, 0, 0)
            )
        except (
            ValueError
        ):  # words, or another number of numbers: the published script takes an empty box
            x0 = y0 = x1 = y1 = 0
        predicted = to_frame(
            Box(x0=x0, y0=y0, x1=x1, y1=y1, frame="grid"), "pixel", size=(width, height)
        )
        gx0, gy0, gx1, gy1 = case["gt_bbox"]
        expected = Box(x0=gx0, y0=gy0, x1=gx1, y1=gy1)
        overlap = iou(predicted, expected)
        right += overlap >= 0.5
        name = f"{case['answer']} for {case['gt_bbox']}"
        theirs = float("nan") if case["iou"] is None else case["iou"]
        allowed = IOU + _float32_error(predicted) + _float32_error(expected)
        yield Result(
            case=name, of="IoU", deviation=abs(overlap - theirs), allowed=allowed, ours=overlap
        )
        yield same(name, "right", overlap >= 0.5, case["correct"])
    yield Result(
        case="precision_at_1",
        of="share",
        deviation=abs(right / data["n"] - data["precision_at_1"]),
        allowed=1e-9,
    )


CHECKS = {
    "grounding/normalize_bbox.json": normalize_bbox,
    "grounding/response_boxes.json": response_boxes,
    "grounding/swift_objects.json": swift_objects,
    "grounding/img/*": image_sizes,
    "metrics/grounding_iou.json": grounding_iou,
}
