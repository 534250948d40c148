"""Reads the tags in the text of a draft, and the markup of objects."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

from qwenvl_lit.data.readers.boxes import FRAME_LIMITS, BoxReader
from qwenvl_lit.data.readers.drafts import (
    DraftPart,
    DraftTurn,
    ImageReference,
    Placeholder,
    PlainText,
)
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.types import DataError, GroundedObject, ImageSource, Part, Role

_TAG = re.compile(r"<img>|<image>|<ref-object>|<bbox>")
_IMG_END = "</img>"
# Tags of other layouts for what is not read here; in an answer they can only be text.
_UNREAD_TAG = re.compile(r"</?(?:video|audio)>|<\|(?:image|video|audio)_pad\|>|<\|vision_start\|>")
_MARKUP = re.compile(r"</?(?:img|ref|box|quad)>")


Markup = Literal["all", "questions", "none"]
ReadTurn = tuple[Role, list[DraftPart]]
LITERAL_ANSWER = "if the answer means this text literally, set data.markup=questions"
LITERAL_QUESTION = "if this text is meant literally, set data.markup=none"


def read_tags(turns: Sequence[DraftTurn], markup: Markup) -> list[ReadTurn]:
    """Replaces the tags in the text of all turns by what they stand for.

    Args:
        markup: where tags are read: in all turns, in all but answers, or nowhere. Text elsewhere
            becomes `PlainText`.

    Raises:
        DataError: a question has a tag that stands for neither text nor an image.
    """
    read = []
    for role, parts in turns:
        is_answer = role == "assistant"
        if markup == "none" or (markup == "questions" and is_answer):
            read.append((role, _plain_parts(parts)))
        else:
            read.append((role, _split_parts(parts, is_answer)))
    return read


def _plain_parts(parts: Sequence[DraftPart]) -> list[DraftPart]:
    plain: list[DraftPart] = []
    for part in parts:
        plain.append(PlainText(part) if isinstance(part, str) else part)
    return plain


def _split_parts(parts: Sequence[DraftPart], is_answer: bool) -> list[DraftPart]:
    pieces: list[DraftPart] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            pieces += group
            continue
        text = "".join(group)
        if not is_answer:
            _check_question(text)
        for piece, tag in split_at_tags(text):
            pieces.append(piece)
            if isinstance(tag, str):
                pieces.append(ImageReference(tag))
            elif tag is not None:
                pieces.append(tag)
    return pieces


def _check_question(text: str) -> None:
    if tag := _UNREAD_TAG.search(text):
        raise DataError(
            f"{tag[0]} in a question stands for a video, for audio or for another model's image, "
            f"and only images written as described in docs/data.md are read; remove the tag, or "
            f"{LITERAL_QUESTION}"
        )


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


def place_listed_images(
    turns: Sequence[ReadTurn],
    listed: Sequence[ImageReference],
    has_image_items: bool,
    notes: list[str],
) -> Sequence[ImageReference]:
    """Assigns the `images` of a row to the `<image>` tags of its turns, which are changed in place.

    - Tags in questions come first. If answers have more tags than there are images left, these
      tags are text, as in Markdown.
    - Without tags in a question, and with more tags in answers than images, all images are put
      before the first question.
    - If the turns name the same images by path, the list only repeats them, or has their bytes.

    Args:
        listed: the row's `images`.
        has_image_items: an answer has items of the type "image", which are never text.
        notes: gets what may be meant otherwise.

    Returns:
        The images that the tags stand for.

    Raises:
        DataError: questions have more tags than there are images, some images have no tag, or the
            list repeats some of the images that are named by path, but not all.
    """
    in_questions = in_answers = 0
    for role, parts in turns:
        if role == "assistant":
            in_answers += parts.count(Placeholder.IMAGE)
        else:
            in_questions += parts.count(Placeholder.IMAGE)
    left = len(listed) - in_questions
    if in_answers > left >= 0 and not has_image_items:
        kept = left if in_questions else 0
        _make_text(turns, skip=kept)
        notes.append(
            f"{in_answers - kept} <image> tags in answers are text, because `images` has no image "
            f"for them; data.markup=questions confirms this"
        )
        in_answers = kept
    elif in_answers:
        notes.append(f"an <image> tag in an answer is an image; {LITERAL_ANSWER}")
    tags = in_questions + in_answers
    if tags and tags != len(listed):
        raise DataError(
            f"{tags} <image> tags for {len(listed)} `images`; write one tag for each image, or "
            f"none to put all images before the first question"
        )
    return listed if tags else _place_in_front(turns, listed)


def _make_text(turns: Sequence[ReadTurn], *, skip: int) -> None:
    """Turns the `<image>` tags of answers into text, except the first `skip`."""
    for role, parts in turns:
        if role != "assistant":
            continue
        for position, part in enumerate(parts):
            if part is Placeholder.IMAGE:
                skip -= 1
                if skip < 0:
                    parts[position] = PlainText(Placeholder.IMAGE.value)


def _place_in_front(
    turns: Sequence[ReadTurn], listed: Sequence[ImageReference]
) -> Sequence[ImageReference]:
    """Puts placeholders before the first question, unless the turns name the images by path."""
    named: list[str] = []
    for _, parts in turns:
        named += [part.address for part in parts if isinstance(part, ImageReference)]
    named_paths = list(map(os.path.normpath, named))
    if named and named_paths == [os.path.normpath(image.address) for image in listed]:
        _use_listed(turns, listed)
        return ()
    for image in listed:
        if image.address and os.path.normpath(image.address) in named_paths:
            raise DataError(
                f"image {image.address[:100]!r} is in `images` and is named by path in the text, "
                f"too; write it once: as <img>path</img>, or as <image> with its path in `images`"
            )
    question = next(parts for role, parts in turns if role == "user")
    question[:0] = [Placeholder.IMAGE] * len(listed)
    return listed


def _use_listed(turns: Sequence[ReadTurn], listed: Sequence[ImageReference]) -> None:
    """Replaces the images that the turns name by path with the same ones of the row's list."""
    next_listed = iter(listed)
    for _, parts in turns:
        for position, part in enumerate(parts):
            if isinstance(part, ImageReference):
                parts[position] = next(next_listed)


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


def stray_markup(text: str) -> str | None:
    """Returns a clause about markup that stayed text since it cannot be read; None if none did."""
    stray = _MARKUP.search(text)
    if stray is None:
        return None
    return (
        f"cannot read {text[stray.start() :][:60]!r}; expected <img>path</img>, <ref>label</ref>, "
        f"<box>(x1,y1),(x2,y2)</box> or <quad> with four points, of whole numbers"
    )


def texts_in(parts: Sequence[DraftPart]) -> Iterator[str]:
    for part in parts:
        match part:
            case str(text) | PlainText(text=text) | ImageReference(address=text):
                yield text


def images_in(
    turns: Sequence[ReadTurn], listed: Sequence[ImageReference]
) -> Iterator[tuple[Role, ImageReference]]:
    """Yields role and reference of all images in reading order.

    Args:
        listed: the images that the placeholders stand for.
    """
    next_listed = iter(listed)
    for role, parts in turns:
        for part in parts:
            if part is Placeholder.IMAGE:
                yield role, next(next_listed)
            elif isinstance(part, ImageReference):
                yield role, part


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
        self._has_box = False
        self._first_label: str | None = None  # of those that markup in an answer gives

    def read(self, role: Role, draft_parts: Sequence[DraftPart]) -> tuple[Part, ...]:
        parts: list[Part] = []
        for part in draft_parts:
            match part:
                case str():
                    self._append_text(parts, part, role)
                case PlainText(text=text):
                    _append(parts, text)
                case ImageReference() | Placeholder.IMAGE:
                    parts.append(self._images[self._images_read])
                    self._images_read += 1
                case Placeholder.LABEL:
                    obj = next(self._labelled)
                    if obj.label is None:
                        raise self._boxes.error(
                            "a <ref-object> stands for an object without `caption`, in the lists "
                            "of ms-swift 3 without an entry in `ref`"
                        )
                    _append(parts, GroundedObject(label=obj.label, image=obj.image))
                case Placeholder.BOXES:
                    obj = next(self._boxed)
                    if not obj.boxes:
                        raise self._boxes.error("a <bbox> stands for an object without `bbox`")
                    self._has_box = True
                    _append(parts, GroundedObject(boxes=obj.boxes, image=obj.image))
        return tuple(parts)

    def note_labels(self) -> None:
        """Notes a label in an answer if the row has no box: `<ref>` is also a tag of wikis."""
        if self._first_label is not None and not self._has_box:
            self._boxes.notes.append(
                f"the answer has the label {reprlib.repr(self._first_label)} in <ref> tokens, and "
                f"the row has no box; {LITERAL_ANSWER}"
            )

    def _append_text(self, parts: list[Part], text: str, role: Role) -> None:
        if "<" not in text:  # most text has no markup, and rows are read each time they are fetched
            _append(parts, text)
            return
        for part in objects_from_tags(text, image=max(0, self._images_read - 1), of_row=True):
            if isinstance(part, GroundedObject):
                self._has_box |= bool(part.boxes)
                if role == "assistant" and self._first_label is None:
                    self._first_label = part.label
                _append(parts, self._checked(part))
                continue
            if problem := stray_markup(part):
                literally = LITERAL_ANSWER if role == "assistant" else LITERAL_QUESTION
                raise self._boxes.error(f"{problem}; {literally}")
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
