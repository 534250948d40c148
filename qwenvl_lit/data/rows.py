"""What a row says, taken apart into text, pictures and grounded objects, and checked. Faults are reported, never repaired."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from qwenvl_lit.data.layouts import Draft
from qwenvl_lit.grounding import GRID, objects_from_tags
from qwenvl_lit.types import Box, Conversation, DataError, Frame, GroundedObject, Part, Picture, Quad, Turn

FRAMES: dict[str | None, Frame] = {"real": "pixel", "norm_1000": "grid", "norm_1": "unit", None: "grid"}  # `bbox_type` of ms-swift


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the rows of one dataset are read, whatever their layout."""

    root: Path | None = None  # where relative files and pictures are looked up; None: beside the file that names them
    path_map: Mapping[str, str] = field(default_factory=dict)  # how absolute paths begin on another machine -> how they begin here
    on_bad_box: Literal["error", "keep", "repair", "drop"] = "error"
    prompt: str | None = None  # how captions and questions are asked where a layout holds none; None: the reader's default
    cache: Path | None = None  # folder of remote pictures and indexes of files; None: no remote pictures, indexes in memory only
    download: bool = True  # remote pictures may be fetched; false: only what `cache` holds
    seed: int = 0


DEFAULT = Reading()


_TAG = re.compile(r"<img>(.*?)</img>|<image>|<ref-object>|<bbox>", re.DOTALL)
_MARKUP = re.compile(r"</?(?:img|ref|box|quad)>")
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:(?://|.*;base64,)")


def conversation_from(draft: Draft, *, id: str, root: Path, index: int, columns: Mapping[str, str], where: str = "") -> Conversation:
    """The conversation of a row.

    - A picture is `<img>path</img>` in the text, which stays as it is around it; or an `<image>` tag, which becomes `Picture k: `, the next
      of `images` and a line break, as ms-swift writes it. Without any tag all `images` stand before the first question.
    - The k-th `<ref-object>` is the caption of the k-th object, the k-th `<bbox>` its boxes; both are counted over all turns.
    - `<ref>`, `<box>` and `<quad>` in the text are objects on the grid, in the last picture before them.

    Raises:
        DataError: turns do not alternate, a picture is missing or remote, tags and what they stand for differ in number, markup cannot be
            read, a box has its corners in the wrong order, is outside its picture or has fractions on the grid.
    """
    _check_roles([role for role, _ in draft.turns])
    texts = _with_image_tags(draft)
    objects = [_object(f"object {number}", raw) for number, raw in enumerate(draft.objects, 1)]
    _check_placeholders("\n".join(texts), len(objects))
    reader = _TextReader(draft.images, objects, root)
    turns = tuple(Turn(role=role, parts=reader.parts(text)) for (role, _), text in zip(draft.turns, texts, strict=True))
    for number, thing in enumerate(objects, 1):
        _check_place(f"object {number} ({thing.label!r})", thing, reader.pictures)
    if not reader.pictures and any(isinstance(part, GroundedObject) and part.boxes for turn in turns for part in turn.parts):
        raise DataError("there is a box but no picture; write <img>path</img> into the question or give `images`")
    return Conversation(id=id, turns=turns, references=draft.references, columns=columns, index=index, where=where)


def _check_roles(roles: Sequence[str]) -> None:
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise DataError("there is no turn; expected at least a question")
    for number, role in enumerate(spoken):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(f"turns go user, assistant, user, ..., at most one system turn before them; got {', '.join(roles)}")


def _with_image_tags(draft: Draft) -> list[str]:
    texts = [text for _, text in draft.turns]
    tags = sum(text.count("<image>") for text in texts)
    if tags == len(draft.images):
        return texts
    if tags:
        raise DataError(
            f"{tags} <image> tags for {len(draft.images)} `images`; write one tag for each, or none to have all before the first question"
        )
    first = [role for role, _ in draft.turns].index("user")
    texts[first] = "<image>" * len(draft.images) + texts[first]
    return texts


def _check_placeholders(text: str, objects: int) -> None:
    labels, boxes = text.count("<ref-object>"), text.count("<bbox>")
    if max(labels, boxes) != objects:
        raise DataError(
            f"{labels} <ref-object> and {boxes} <bbox> for {objects} `objects`; the k-th placeholder of a kind stands for the k-th object, "
            f"and each object needs one"
        )


class _TextReader:
    """Takes the texts of one conversation apart, in order."""

    def __init__(self, images: Sequence[str], objects: Sequence[GroundedObject], root: Path):
        self.pictures: list[Picture] = []
        self._root = root
        self._images = iter(images)
        self._labels = iter(objects)
        self._boxes = iter(objects)

    def parts(self, text: str) -> tuple[Part, ...]:
        if "<" not in text:  # most are; rows are read anew each time they are fetched
            return (text,) if text else ()
        parts: list[Part] = []
        end = 0
        for tag in _TAG.finditer(text):
            self._add_text(parts, text[end : tag.start()])
            end = tag.end()
            match tag.group():
                case "<ref-object>":
                    thing = next(self._labels)
                    if thing.label is None:
                        raise DataError("a <ref-object> stands for an object without `caption`")
                    _add(parts, GroundedObject(label=thing.label, picture=thing.picture))
                case "<bbox>":
                    thing = next(self._boxes)
                    _add(parts, GroundedObject(boxes=thing.boxes, picture=thing.picture))
                case "<image>":
                    _add(parts, f"Picture {len(self.pictures) + 1}: ")
                    self._add_picture(parts, next(self._images))
                    _add(parts, "\n")
                case _:
                    self._add_picture(parts, tag.group(1))
        self._add_text(parts, text[end:])
        return tuple(parts)

    def _add_picture(self, parts: list[Part], path: str) -> None:
        self.pictures.append(picture_from(path, self._root))
        parts.append(self.pictures[-1])

    def _add_text(self, parts: list[Part], text: str) -> None:
        if "<" not in text:
            _add(parts, text)
            return
        for part in objects_from_tags(text, picture=max(0, len(self.pictures) - 1)):
            if isinstance(part, GroundedObject):
                for box in part.boxes:
                    _check_box("text", box, (GRID, GRID))
            elif stray := _MARKUP.search(part):
                raise DataError(
                    f"cannot read {part[stray.start() :][:60]!r}; expected <img>path</img>, <ref>label</ref>, <box>(x1,y1),(x2,y2)</box> "
                    f"or <quad> with four points, of whole numbers"
                )
            _add(parts, part)


def picture_from(path: str, root: Path) -> Picture:
    """The picture at `path`, within `root` unless absolute.

    Raises:
        DataError: it does not exist, or is not a path.
    """
    if _REMOTE.match(path):
        raise DataError(f"picture {path[:100]!r} is not a file; pictures are read from disk only: download it and give its path")
    file = root / path
    if not os.path.isfile(file):
        raise DataError(f"picture {file} does not exist; check the path and `data.root`")
    return Picture(file)


def _add(parts: list[Part], part: Part) -> None:
    """Append; text continues text, and boxes right behind an object of the same picture are its boxes, as they read in the markup."""
    last = parts[-1] if parts else None
    if isinstance(part, str):
        if isinstance(last, str):
            parts[-1] = last + part
        elif part:
            parts.append(part)
    elif _continues(part, last):
        parts[-1] = GroundedObject(label=last.label, boxes=last.boxes + part.boxes, picture=part.picture)
    else:
        parts.append(part)


def _continues(part: Part, last: Part | None) -> bool:
    if not (isinstance(part, GroundedObject) and isinstance(last, GroundedObject)) or part.label is not None:
        return False
    return part.picture == last.picture or not last.boxes


def _object(what: str, raw: Any) -> GroundedObject:
    """An entry of `objects`: a mapping, or a pair (caption, box on the grid)."""
    if isinstance(raw, list) and len(raw) == 2:
        raw = {"caption": raw[0], "bbox": raw[1], "bbox_type": None}
    if not isinstance(raw, dict) or "bbox_type" not in raw or raw["bbox_type"] not in FRAMES:
        raise DataError(f"{what} is {{caption, bbox, bbox_type: real, norm_1000 or norm_1, image}}, got {raw!r}")
    label, image, values = raw.get("caption"), raw.get("image"), raw.get("bbox")
    if not isinstance(label, str | None) or not isinstance(image, int | None):
        raise DataError(f"{what}: `caption` is text and `image` a number, got {label!r} and {image!r}")
    nested = values if isinstance(values, list) and values and isinstance(values[0], list) else [values]
    boxes = tuple(_box(f"{what} ({label!r})", box, FRAMES[raw["bbox_type"]]) for box in nested)
    return GroundedObject(label=label, boxes=boxes, picture=image or 0)


def _box(what: str, values: Any, frame: Frame) -> Box:
    if (
        not isinstance(values, list)
        or len(values) != 4
        or not all(type(value) in (int, float) and math.isfinite(value) for value in values)
    ):
        raise DataError(f"{what}: `bbox` is [x1, y1, x2, y2] or a list of such, got {values!r}")
    if frame == "grid" and any(value != int(value) for value in values):
        raise DataError(f"{what}: {values} has fractions on the grid of 0..{GRID}; round them, or give `bbox_type` real or norm_1")
    return Box(x0=values[0], y0=values[1], x1=values[2], y1=values[3], frame=frame)


def _check_place(what: str, thing: GroundedObject, pictures: Sequence[Picture]) -> None:
    if not 0 <= thing.picture < len(pictures):
        raise DataError(f"{what} is in `image` {thing.picture}, counted from 0, but the row has {len(pictures)} pictures")
    for box in thing.boxes:
        match box.frame:
            case "grid":
                limits = (GRID, GRID)
            case "unit":
                limits = (1, 1)
            case "pixel":
                limits = _size(pictures[thing.picture].source)
        _check_box(what, box, limits)


def _check_box(what: str, box: Box | Quad, limits: tuple[float, float]) -> None:
    corners = box.points if isinstance(box, Quad) else ((box.x0, box.y0), (box.x1, box.y1))
    if isinstance(box, Box) and (box.x0 > box.x1 or box.y0 > box.y1):
        raise DataError(f"{what}: box {corners} has its corners in the wrong order; the top left one comes first")
    if any(not 0 <= x <= limits[0] or not 0 <= y <= limits[1] for x, y in corners):
        raise DataError(
            f"{what}: box {corners} is not within its picture, (0, 0) to {limits} in this frame; check the box and its `bbox_type`"
        )


@lru_cache(maxsize=1 << 16)
def _size(file: Path) -> tuple[int, int]:
    return Picture(file).size  # opening a file takes longer than all the rest of a row
