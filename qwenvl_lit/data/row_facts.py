"""Extracts the facts about each row that the inspection of a dataset uses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from qwenvl_lit.data.image_notes import image_notes
from qwenvl_lit.data.other_markup import box_form
from qwenvl_lit.data.survey import Kind
from qwenvl_lit.grounding import GRID
from qwenvl_lit.types import (
    BadImage,
    Conversation,
    DataError,
    Dropped,
    GroundedObject,
    ImageSource,
    Turn,
)

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor


@dataclass(frozen=True, slots=True)
class RowFacts:
    """Facts about one row. They are small, because the facts of all rows are in memory."""

    tokens: int  # 0 if the row cannot be encoded
    supervised_tokens: int
    boxes: int
    has_answer: bool
    has_empty_answer: bool  # its answer is blank
    question: bytes  # hash of the prompt without its images
    images: tuple[ImageSource | str, ...]
    """In reading order. An image whose data is in the row is represented by its content key."""
    broken_images: tuple[str, ...]  # problems of image data in the row that cannot be decoded
    findings: tuple[tuple[Kind, str], ...]  # kinds and problems
    id: str  # "", as is `where`, if the row has neither broken images nor findings, to save memory
    where: str
    id_digest: bytes


@dataclass(frozen=True, slots=True)
class RowReader:
    """Extracts the facts about a conversation.

    Args:
        prompt: whether rows are prompts for generation, which have no supervised tokens.
    """

    processor: Processor
    prompt: bool

    def __call__(self, conversation: Conversation) -> RowFacts:
        findings: list[tuple[Kind, str]] = []
        on_text = _notes_on_text(conversation, self.processor.own_box_form)
        for note in (*conversation.notes, *on_text):
            findings.append(("note", note))
        tokens = supervised_tokens = 0
        try:
            length = self.processor.length(conversation, prompt=self.prompt)
            tokens, supervised_tokens = length.tokens, length.supervised
            limit = self.processor.settings.get("max_length")
            if self.prompt and limit and tokens > limit:
                note = f"the question has {tokens} tokens, more than model.max_length={limit}"
                findings.append(("note", f"{note} allows in training; it is answered in full"))
        except BadImage:
            pass  # its size is needed; the image is reported when it is decoded
        except DataError as error:
            findings.append(("dropped" if isinstance(error, Dropped) else "error", str(error)))
        images: list[ImageSource | str] = []
        broken_images: list[str] = []
        for image in conversation.images:
            if not isinstance(image.source, bytes | Image.Image):
                images.append(image)
                continue
            try:
                image.open()
                images.append(image.key)
                for note in image_notes(image):
                    findings.append(("image", note))
            except DataError as error:
                broken_images.append(str(error))
        return RowFacts(
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            boxes=_count_boxes(conversation),
            has_answer=conversation.answer is not None,
            has_empty_answer=conversation.answer is not None and is_blank(conversation.answer),
            question=_question_digest(conversation),
            images=tuple(images),
            broken_images=tuple(broken_images),
            findings=tuple(findings),
            id=conversation.id if broken_images or findings else "",
            where=conversation.where if broken_images or findings else "",
            id_digest=digest(conversation.id.encode("utf-8", "surrogatepass"))[:8],
        )


def is_blank(turn: Turn) -> bool:
    return all(isinstance(part, str) and not part.strip() for part in turn.parts)


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _notes_on_text(conversation: Conversation, own_box_form: str | None) -> Iterator[str]:
    """Yields what is unusual about the texts of a conversation."""
    forms = set()
    for number, turn in enumerate(conversation.turns, 1):
        texts = [part for part in turn.parts if isinstance(part, str)]
        if conversation.images:
            forms.update(box_form(text, own_box_form) for text in texts)
        if turn.role != "assistant" or not is_blank(turn):
            continue
        if any(texts):
            yield f"the answer in turn {number} is blank"
        elif number == len(conversation.turns):
            yield "the answer is empty: only its end-of-turn token is supervised"
        else:
            yield f"the answer in turn {number} is empty: nothing of it is supervised"
    for form in sorted(filter(None, forms)):
        yield (
            f"text has boxes in the form of {form}, which is plain text for this model; "
            f"convert them to <box>(x1,y1),(x2,y2)</box> on the grid 0..{GRID}, or to `objects`"
        )


def _question_digest(conversation: Conversation) -> bytes:
    question = []
    for turn in conversation.prompt().turns:
        parts = list(turn.parts)
        for position, part in enumerate(parts):
            if isinstance(part, ImageSource):
                parts[position] = ""
        question.append((turn.role, parts))
    return digest(repr(question).encode("utf-8", "surrogatepass"))


def _count_boxes(conversation: Conversation) -> int:
    boxes = 0
    for turn in conversation.turns:
        for part in turn.parts:
            if isinstance(part, GroundedObject):
                boxes += len(part.boxes)
    return boxes
