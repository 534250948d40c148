"""Conversations as Qwen-VL reads them: an image is a span of 256 tokens, a box is tagged text, turns are ChatML or plain text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Literal, get_args

import torch

from qwenvl_lit.grounding import Tag, object_in_frame, objects_from_tags, tags_from_object
from qwenvl_lit.models.chatml import ChatML, Message, Piece, Supervise, truncate_left, with_system
from qwenvl_lit.models.protocols import FeatureSource
from qwenvl_lit.models.qwen_vl.image_processing import resized
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import (
    Conversation,
    DataError,
    Dropped,
    GroundedObject,
    ImageSource,
    Part,
    Prediction,
    Sample,
    Turn,
)

NAMED_IMAGE = re.compile(r"Picture\s*\d+\s*[:：]\s*$")

Template = Literal["chatml", "raw"]
TooLong = Literal["error", "drop", "truncate_left"]


@contextmanager
def _naming(conversation: Conversation) -> Iterator[None]:
    """Faults get the name of the row they are in."""
    try:
        yield
    except DataError as fault:
        raise type(fault)(
            f"{conversation.where}: sample {conversation.id!r}: {fault}".removeprefix(": ")
        ) from fault


class QwenVLProcessor:
    """Conversations to tensors, and generated ids to text and boxes.

    Args:
        span: tokens of an image, its two tags not counted.
        side: width and height of the resized images, in pixels.
        template: "chatml"; or "raw", for the base model: the texts one after the other, an answer ends with `<|endoftext|>`.
        system: the system message of conversations without one: None is the default sentence, "" an empty message. Not for "raw".
        supervise: see `ChatML`; "raw" learns answers and their end marks.
        max_length: most tokens of a training sample.
        too_long: what becomes of longer ones: "error"; "drop": they are left out; or "truncate_left": the last tokens are kept, and
            images whole or not at all.
        window: a prompt's system message and earlier exchanges have fewer tokens than this; older exchanges are left out. Not for "raw".
        features: computes or looks up the vision features of images, in place of their pixels.
            While it returns None, samples have pixels.
    """

    supports_packing = True

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        *,
        span: int = 256,
        side: int = 448,
        template: Template = "chatml",
        system: str | None = None,
        supervise: Supervise = "answers",
        max_length: int | None = None,
        too_long: TooLong = "error",
        window: int = 6144,
        features: FeatureSource | None = None,
    ):
        for name, value, choices in (
            ("template", template, Template),
            ("supervise", supervise, Supervise),
            ("too_long", too_long, TooLong),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name} is one of {', '.join(get_args(choices))}, got {value!r}")
        self.tokenizer = tokenizer
        self.span = span
        self.side = side
        self.template = template
        self.system = system
        self.supervise = supervise
        self.max_length = max_length
        self.too_long = too_long
        self.window = window
        self.chatml = ChatML(
            tokenizer.encode,
            start=tokenizer.im_start_id,
            end=tokenizer.im_end_id,
            supervise=supervise,
        )
        self.features = features
        self.pad_id = tokenizer.pad_id
        self.stop_ids = (
            (tokenizer.pad_id,)
            if template == "raw"
            else (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.pad_id)
        )

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Ids and labels in one pass; `prompt` leaves the answer out and opens the assistant's turn.

        An image is introduced by `Picture k: ` and followed by a newline, unless the text before it does the former, or in "raw".

        Raises:
            Dropped: the sample is too long, and that is what `too_long` says.
            DataError: an image is unreadable, a box names one that does not exist, the sample is too long, or nothing can be learned.
        """
        with _naming(conversation):
            return self._sample(conversation, self._fated(conversation, prompt))

    def length(self, conversation: Conversation, *, prompt: bool = False) -> tuple[int, int]:
        """Tokens of `encode(conversation, prompt=prompt)`, and how many of them are learned, without decoding an image.

        Raises:
            DataError: as `encode`, but for images that cannot be decoded.
        """
        with _naming(conversation):
            pieces = self._fated(conversation, prompt)
        tokens, learned = (
            sum(len(piece.ids) for piece in some)
            for some in (pieces, [piece for piece in pieces if piece.learned])
        )
        return tokens, learned - pieces[0].learned  # nothing predicts the first token

    @property
    def settings(self) -> dict[str, Any]:
        """What decides ids and labels, as plain data: two processors with equal settings encode alike."""
        vocabulary = hashlib.sha256(self.tokenizer.path.read_bytes()).hexdigest()
        names = (
            "span",
            "side",
            "template",
            "system",
            "supervise",
            "max_length",
            "too_long",
            "window",
        )
        return {
            "processor": type(self).__name__,
            "vocabulary": vocabulary,
            **{name: getattr(self, name) for name in names},
        }

    @property
    def image_settings(self) -> dict[str, Any]:
        return {"side": self.side}

    def pixels(self, image: ImageSource) -> torch.Tensor:
        """(side, side, 3) uint8."""
        return resized(image.open(), self.side)

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens by their names; an image's span shows nothing between its tags."""
        return self.tokenizer.decode(ids)

    def decode(self, ids: Sequence[int], conversation: Conversation) -> Prediction:
        """The answer up to the first stop id. Boxes are taken to be in the last image of the prompt."""
        answer = takewhile(lambda id: id not in self.stop_ids, ids)
        return self.read(
            self.tokenizer.decode(answer, skip_special=True, keep=self.tokenizer.tag_ids).strip(),
            conversation,
        )

    def read(self, text: str, conversation: Conversation) -> Prediction:
        images = conversation.prompt().images
        parts: Sequence[Part] = objects_from_tags(text, image=max(len(images) - 1, 0))
        if images:
            parts = [
                object_in_frame(part, "pixel", images) if isinstance(part, GroundedObject) else part
                for part in parts
            ]
        return Prediction(
            conversation=conversation,
            text=text,
            parts=tuple(parts),
            reference=self._reference(conversation),
        )

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Ids of each of the conversation's options, as they follow its prompt; after a raw one, which ends in a word, with a space."""
        return [
            self.tokenizer.encode(f" {option}" if self.template == "raw" else option)
            for option in conversation.options
        ]

    def _reference(self, conversation: Conversation) -> str | None:
        if conversation.answer is None:
            return None
        written = self._written(
            conversation.answer, len(conversation.prompt().images), conversation.images
        )
        return "".join(
            item.value
            if isinstance(item, Tag)
            else "<img></img>"
            if isinstance(item, int)
            else item
            for item in written
        )

    def _fated(self, conversation: Conversation, prompt: bool) -> list[Piece]:
        pieces = self._pieces(conversation, prompt)
        return (
            [piece._replace(learned=False) for piece in pieces] if prompt else self._fitted(pieces)
        )

    def _pieces(self, conversation: Conversation, prompt: bool) -> list[Piece]:
        turns: Sequence[Turn] = conversation.prompt().turns if prompt else conversation.turns
        if self.template == "chatml":
            turns = with_system(turns, self.system)
        messages, images_before = [], 0
        for turn in turns:
            messages.append(
                Message(turn.role, list(self._body(turn, images_before, conversation.images)))
            )
            images_before += sum(isinstance(part, ImageSource) for part in turn.parts)
        if self.template == "raw":
            return list(self._raw(messages))
        if prompt:
            messages = self.chatml.recent(messages, self.window)
        return list(self.chatml.render(messages, prompt=prompt))

    def _raw(self, messages: Sequence[Message]) -> Iterator[Piece]:
        for role, body in messages:
            for piece in body:
                yield piece._replace(learned=role == "assistant" and piece.image is None)
            if role == "assistant":
                yield Piece([self.pad_id], learned=True)

    def _body(
        self, turn: Turn, images_before: int, images: Sequence[ImageSource]
    ) -> Iterator[Piece]:
        """Texts that stand side by side are one run for the tokenizer; only tags and images become special ids."""
        special, text = self.tokenizer.special, ""
        for item in self._written(turn, images_before, images):
            if isinstance(item, str):
                text += item
                continue
            if text:
                yield Piece(self.tokenizer.encode(text))
            text = ""
            if isinstance(item, Tag):
                yield Piece([special[item.value]])
            else:
                yield Piece(
                    [special["<img>"], *[special["<imgpad>"]] * self.span, special["</img>"]],
                    image=item,
                )
        if text:
            yield Piece(self.tokenizer.encode(text))

    def _written(
        self, turn: Turn, images_before: int, images: Sequence[ImageSource]
    ) -> Iterator[str | Tag | int]:
        """A turn as text, tags, and images by index."""
        index, before = images_before, ""
        for part in turn.parts:
            if isinstance(part, str):
                yield part
                before += part
                continue
            if isinstance(part, GroundedObject):
                yield from tags_from_object(part, images)
            elif self.template == "raw" or NAMED_IMAGE.search(before):
                yield index
                index += 1
            else:
                yield f"Picture {index + 1}: "
                yield index
                yield "\n"
                index += 1
            before = ""

    def _fitted(self, pieces: list[Piece]) -> list[Piece]:
        length = sum(len(piece.ids) for piece in pieces)
        if self.max_length and length > self.max_length:
            excess = f"{length} tokens are more than max_length={self.max_length}"
            if self.too_long == "drop":
                raise Dropped(excess)
            if self.too_long == "error":
                raise DataError(f"{excess}; raise it, or set too_long=drop or truncate_left")
            pieces = truncate_left(pieces, self.max_length)
        if not any(
            piece.learned for piece in pieces[1:]
        ):  # the first token has nothing before it to be predicted from
            raise DataError(
                "no answer to learn from; is the last turn the assistant's, and is max_length above the answer's length?"
            )
        return pieces

    def _sample(self, conversation: Conversation, pieces: Sequence[Piece]) -> Sample:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        images: list[ImageSource] = []
        for piece in pieces:
            if piece.image is not None:
                positions += range(len(ids) + 1, len(ids) + 1 + self.span)
                images.append(conversation.images[piece.image])
            ids += piece.ids
            labels += piece.ids if piece.learned else [-100] * len(piece.ids)
        return Sample(
            conversation=conversation,
            input_ids=torch.tensor(ids, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            vision_positions=torch.tensor(positions, dtype=torch.int64),
            vision=self._seen(images),
        )

    def _seen(self, images: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        features = self.features(images) if self.features is not None else None
        if features is not None:
            return {"vision_features": features}
        pixels = [self.pixels(image) for image in images]
        return {
            "pixel_values": torch.stack(pixels)
            if pixels
            else torch.empty(0, self.side, self.side, 3, dtype=torch.uint8)
        }
