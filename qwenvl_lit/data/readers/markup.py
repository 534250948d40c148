"""Reads the tags in the text of a draft, and the markup of objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from qwenvl_lit.data.readers.boxes import FRAME_LIMITS, BoxReader
from qwenvl_lit.data.readers.drafts import DraftPart, ImageReference, Placeholder
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.types import DataError, GroundedObject, ImageSource, Part, Role

_TAG = re.compile(r"<img>|<image>|<ref-object>|<bbox>")
_IMG_END = "</img>"
_MARKUP = re.compile(r"</?(?:img|ref|box|quad)>")


def draft_parts(parts: Sequence[DraftPart]) -> list[DraftPart]:
    """Replaces the tags in the text of a turn by what they stand for."""
    pieces: list[DraftPart] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            pieces += group
            continue
        text = "".join(group)
        for piece, tag in split_at_tags(text):
            pieces.append(piece)
            if isinstance(tag, str):
                pieces.append(ImageReference(tag))
            elif tag is not None:
                pieces.append(tag)
    return pieces


def split_at_tags(text: str) -> Iterator[tuple[str, str | Placeholder | None]]:
    """Yields text and the tag after it: address of an `<img>`, `Placeholder`, or None at the end.

    An `<img>` that is not closed stays text. The time is linear in the length of the text: a
    pattern for `<img>...</img>` would search the whole rest of it at each tag that is not closed.

    >>> list(split_at_tags("see <img>a.png</img>!"))
    [('see ', 'a.png'), ('!', None)]
    """
    position = end = 0
    last_close = text.rfind(_IMG_END)
    while tag := _TAG.search(text, position):
        position = tag.end()
        if tag[0] != "<img>":
            yield text[end : tag.start()], Placeholder(tag[0])
        elif position <= last_close:
            close = text.index(_IMG_END, position)
            yield text[end : tag.start()], text[position:close]
            position = close + len(_IMG_END)
        else:
            continue
        end = position
    yield text[end:], None


def place_listed_images(turns: Sequence[tuple[Role, list[DraftPart]]], images: int) -> None:
    """Puts placeholders for `images` before the first question, unless the text has them."""
    tags = sum(parts.count(Placeholder.IMAGE) for _, parts in turns)
    if tags == images:
        return
    if tags:
        raise DataError(
            f"{tags} <image> tags for {images} `images`; write one tag for each image, or none to "
            f"put all images before the first question"
        )
    question = next(parts for role, parts in turns if role == "user")
    question[:0] = [Placeholder.IMAGE] * images


def check_placeholders(parts: Sequence[DraftPart], objects: int, boxes: BoxReader) -> None:
    labels, places = parts.count(Placeholder.LABEL), parts.count(Placeholder.BOXES)
    used = max(labels, places)
    if used < objects and boxes.on_bad_box == "keep":
        boxes.notes.append(f"{objects - used} of {objects} `objects` are not used")
    elif used != objects:
        raise boxes.error(
            f"{labels} <ref-object> and {places} <bbox> for {objects} `objects`; the k-th "
            f"placeholder of a kind stands for the k-th object, and each object needs one"
        )


def texts_in(parts: Sequence[DraftPart]) -> Iterator[str]:
    for part in parts:
        match part:
            case str(text) | ImageReference(address=text):
                yield text


def addresses_in(parts: Sequence[DraftPart], listed: Sequence[str]) -> Iterator[str]:
    """Yields the addresses of all images in reading order; `listed` are those of placeholders."""
    next_listed = iter(listed)
    for part in parts:
        if part is Placeholder.IMAGE:
            yield next(next_listed)
        elif isinstance(part, ImageReference):
            yield part.address


class TurnReader:
    """Reads the turns of one conversation, in order."""

    def __init__(
        self, images: Sequence[ImageSource], objects: Sequence[GroundedObject], boxes: BoxReader
    ):
        self._images = images
        self._images_read = 0
        self._labelled = iter(objects)
        self._boxed = iter(objects)
        self._boxes = boxes

    def read(self, draft_parts: Sequence[DraftPart]) -> tuple[Part, ...]:
        parts: list[Part] = []
        for part in draft_parts:
            match part:
                case str():
                    self._append_text(parts, part)
                case ImageReference():
                    self._append_image(parts)
                case Placeholder.IMAGE:
                    _append(parts, f"Picture {self._images_read + 1}: ")
                    self._append_image(parts)
                    _append(parts, "\n")
                case Placeholder.LABEL:
                    obj = next(self._labelled)
                    if obj.label is None:
                        raise self._boxes.error(
                            "a <ref-object> stands for an object without `caption`"
                        )
                    _append(parts, GroundedObject(label=obj.label, image=obj.image))
                case Placeholder.BOXES:
                    obj = next(self._boxed)
                    _append(parts, GroundedObject(boxes=obj.boxes, image=obj.image))
        return tuple(parts)

    def _append_image(self, parts: list[Part]) -> None:
        parts.append(self._images[self._images_read])
        self._images_read += 1

    def _append_text(self, parts: list[Part], text: str) -> None:
        if "<" not in text:  # most text has no markup, and rows are read each time they are fetched
            _append(parts, text)
            return
        for part in objects_from_tags(text, image=max(0, self._images_read - 1), fractions=True):
            if isinstance(part, GroundedObject):
                _append(parts, self._checked(part))
                continue
            if stray := _MARKUP.search(part):
                raise self._boxes.error(
                    f"cannot read {part[stray.start() :][:60]!r}; expected <img>path</img>, "
                    f"<ref>label</ref>, <box>(x1,y1),(x2,y2)</box> or <quad> with four points, of "
                    f"whole numbers"
                )
            _append(parts, part)

    def _checked(self, obj: GroundedObject) -> GroundedObject:
        if obj.boxes and not self._images:
            if self._boxes.on_bad_box != "keep":
                raise self._boxes.error(
                    "there is a box but no image; write <img>path</img> into the question or give "
                    "`images`; or keep such boxes, data.on_bad_box=keep, or leave their rows out, "
                    "data.on_bad_box=drop"
                )
            self._boxes.notes.append("text: there is a box but no image; kept as it is")
        limits = FRAME_LIMITS["grid"]
        boxes = tuple(self._boxes.check_box("text", box, limits) for box in obj.boxes)
        return GroundedObject(label=obj.label, boxes=boxes, image=obj.image)


def _append(parts: list[Part], part: Part) -> None:
    """Appends a part, or merges it into the last one.

    Text is joined with text before it. Boxes that directly follow an object in the same image
    become boxes of that object, since the markup of both reads the same.
    """
    last = parts[-1] if parts else None
    if isinstance(part, str):
        if isinstance(last, str):
            parts[-1] = last + part
        elif part:
            parts.append(part)
    elif _belongs_to(last, part):
        boxes = last.boxes + part.boxes
        parts[-1] = GroundedObject(label=last.label, boxes=boxes, image=part.image)
    else:
        parts.append(part)


def _belongs_to(last: Part | None, part: Part) -> bool:
    """Tells whether `part` has further boxes of the object `last`."""
    if not isinstance(part, GroundedObject) or not isinstance(last, GroundedObject):
        return False
    return part.label is None and (part.image == last.image or not last.boxes)
