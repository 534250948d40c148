"""The facts about a row that the inspection of a dataset keeps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from qwenvl_lit.data.survey import Kind
from qwenvl_lit.types import Conversation, DataError, Dropped, GroundedObject, ImageSource

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor


@dataclass(frozen=True, slots=True)
class RowFacts:
    """The facts about one row. They are few, since those of all rows are in memory at once."""

    tokens: int  # 0 if the row cannot be encoded
    supervised: int
    boxes: int
    answered: bool
    question: bytes  # digest of the prompt without its images
    images: tuple[ImageSource | str, ...]
    """In reading order: files and addresses, and the content keys of images inside the row."""
    broken: tuple[str, ...]  # messages about images inside the row that cannot be decoded
    findings: tuple[tuple[Kind, str], ...]  # kinds and messages
    id: str  # "" if there is no message about the row


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads the facts of a conversation.

    Args:
        prompt: the row is a question to answer, without supervised tokens.
    """

    processor: Processor
    prompt: bool

    def __call__(self, conversation: Conversation) -> RowFacts:
        findings: list[tuple[Kind, str]] = []
        for note in conversation.notes:
            findings.append(("note", with_location(conversation, note)))
        tokens = supervised = 0
        try:
            tokens, supervised = self.processor.length(conversation, prompt=self.prompt)
        except DataError as error:
            findings.append(("dropped" if isinstance(error, Dropped) else "error", str(error)))
        images: list[ImageSource | str] = []
        broken: list[str] = []
        for image in conversation.images:
            if not isinstance(image.source, bytes | Image.Image):
                images.append(image)
                continue
            try:
                image.open()
                images.append(image.key)
            except DataError as error:
                broken.append(with_location(conversation, error))
        return RowFacts(
            tokens=tokens,
            supervised=supervised,
            boxes=_count_boxes(conversation),
            answered=conversation.answer is not None,
            question=_question_digest(conversation),
            images=tuple(images),
            broken=tuple(broken),
            findings=tuple(findings),
            id=conversation.id if broken or findings else "",
        )


def with_location(conversation: Conversation, message: object) -> str:
    """Returns the message with file, line and row id in front, unless it begins with them."""
    text = str(message)
    if not conversation.where:
        return f"row {conversation.id!r}: {text}"
    if text.startswith(conversation.where):
        return text
    return f"{conversation.where}: row {conversation.id!r}: {text}"


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


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
