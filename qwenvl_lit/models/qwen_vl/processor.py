"""Converts conversations to what Qwen-VL reads, and its answers back.

An image is a span of 256 tokens, a box is tagged text, and turns are ChatML or plain text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Literal, get_args

import torch

from qwenvl_lit.bounds import check_number
from qwenvl_lit.grounding import Tag, object_in_frame, objects_from_tags, tags_from_object
from qwenvl_lit.models.byte_pairs import MAX_BLANKS
from qwenvl_lit.models.chatml import (
    ChatML,
    Message,
    Piece,
    Supervise,
    truncate_left,
    truncate_right,
    with_system,
)
from qwenvl_lit.models.protocols import FeatureSource
from qwenvl_lit.models.qwen_vl.image_processing import resize_image
from qwenvl_lit.models.qwen_vl.tokenizer import EXTRAS, QwenTokenizer
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import (
    Conversation,
    DataError,
    Dropped,
    GroundedObject,
    ImageSource,
    Length,
    Part,
    Prediction,
    Sample,
    Turn,
)

NAMED_IMAGE = re.compile(r"Picture\s*\d+\s*[:：]\s*$")
IGNORED = -100  # the label of a token that is not supervised
MAX_TEXT = MAX_BLANKS  # characters of a turn

Template = Literal["chatml", "raw"]
TooLong = Literal["error", "drop", "truncate_left", "truncate_right"]


@contextmanager
def _locating(conversation: Conversation) -> Iterator[None]:
    """Prefixes errors with the row's file, line and id."""
    try:
        yield
    except DataError as error:
        raise conversation.located(error) from error


class QwenVLProcessor:
    """Converts conversations to tensors, and generated ids to text and boxes.

    Args:
        tokens_per_image: length of an image's span, without its two tags.
        image_size: width and height of the resized images, in pixels.
        template: "chatml"; or "raw" for the base model: the texts one after the other, and an
            answer ends with `<|endoftext|>`.
        system: the system message of conversations without one. None is the default sentence, ""
            an empty message, as the published code writes it, and "none" no message, as ms-swift
            does for an empty one. Unused with "raw".
        supervise: see `ChatML`. With "raw", answers and their `<|endoftext|>` are supervised.
        max_length: largest number of tokens of a training sample.
        too_long: what happens to longer samples. "error" raises, "drop" leaves the row out,
            "truncate_left" keeps the last tokens and "truncate_right", as the published fine-tuning
            script does, the first ones; every image is kept as a whole or not at all. A turn with
            more than `MAX_TEXT` characters is dropped, or else an error.
        max_window_size: a prompt's system message and earlier exchanges have fewer tokens than
            this; the oldest exchanges are left out. Unused with "raw".
        special_tokens: names of extra tokens (`<|extra_0|>` to `<|extra_204|>`) that text may hold.
            All other names of special tokens are plain text.
        features: computes or looks up the vision features of images, in place of their pixels.
            While it returns None, samples have pixels.
    """

    supports_packing = True
    collate_vision = staticmethod(concatenate_vision)

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        *,
        tokens_per_image: int = 256,
        image_size: int = 448,
        template: Template = "chatml",
        system: str | None = None,
        supervise: Supervise = "answers",
        max_length: int | None = None,
        too_long: TooLong = "error",
        max_window_size: int = 6144,
        special_tokens: Sequence[str] | None = None,
        features: FeatureSource | None = None,
    ):
        _check_choice("template", template, get_args(Template))
        _check_choice("supervise", supervise, get_args(Supervise))
        _check_choice("too_long", too_long, get_args(TooLong))
        check_number("model.max_length", max_length, least=1, whole=True, optional=True)
        check_number("model.max_window_size", max_window_size, least=1, whole=True)
        _check_special_tokens(special_tokens or ())
        self.tokenizer = tokenizer
        self.tokens_per_image = tokens_per_image
        self.image_size = image_size
        self.template = template
        self.system = system
        self.supervise = supervise
        self.max_length = max_length
        self.too_long = too_long
        self.max_window_size = max_window_size
        self.special_tokens = tuple(special_tokens or ())
        self.features = features
        self.chatml = ChatML(
            tokenizer.encode,
            start=tokenizer.im_start_id,
            end=tokenizer.im_end_id,
            supervise=supervise,
        )
        self.pad_id = tokenizer.pad_id
        self.stop_ids: tuple[int, ...] = (tokenizer.pad_id,)
        if template == "chatml":
            self.stop_ids = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.pad_id)
        self.continues_text = template == "raw"
        # As the published evaluation asks the base model, and as rows for chat ask
        self.find_prompt = "{image}{question}" if self.continues_text else "{image}Find {question}"

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Returns the ids, labels and images of a conversation.

        With the chat template, `Picture k: ` is written before image k and a newline after it,
        unless the text before it ends with such words already.

        Args:
            prompt: leave out the answer and open a turn of the assistant.

        Raises:
            Dropped: the sample is too long and `too_long` is "drop".
            DataError: an image cannot be read, a box refers to an image that does not exist, the
                sample is too long, or no token is supervised.
        """
        with _locating(conversation):
            return self._sample(conversation, self._pieces(conversation, prompt))

    def length(self, conversation: Conversation, *, prompt: bool = False) -> Length:
        """Returns the size of the sample that `encode` would give.

        No image is read.

        Raises:
            DataError: as `encode`, except for images that cannot be decoded.
        """
        with _locating(conversation):
            pieces = self._pieces(conversation, prompt)
        tokens = sum(len(piece.ids) for piece in pieces)
        supervised = sum(len(piece.ids) for piece in pieces if piece.supervised)
        images = sum(piece.image is not None for piece in pieces)
        return Length(
            tokens=tokens,
            # The first token has nothing before it that could predict it.
            supervised=supervised - pieces[0].supervised,
            image_tokens=images * self.tokens_per_image,
        )

    @property
    def shown_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that the text of an answer shows."""
        named = (self.tokenizer.special[name] for name in self.special_tokens)
        return (*self.tokenizer.tag_ids, *named)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data that determines ids and labels; see `Processor.settings`."""
        return {
            "processor": type(self).__name__,
            "vocabulary": hashlib.sha256(self.tokenizer.path.read_bytes()).hexdigest(),
            "tokens_per_image": self.tokens_per_image,
            "image_size": self.image_size,
            "template": self.template,
            "system": self.system,
            "supervise": self.supervise,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "max_window_size": self.max_window_size,
            "special_tokens": self.special_tokens,
        }

    @property
    def image_settings(self) -> dict[str, Any]:
        """Plain data that determines the result of `image_vision`."""
        return {"image_size": self.image_size}

    def image_vision(self, image: ImageSource) -> dict[str, torch.Tensor]:
        """Returns the resized image, (1, image_size, image_size, 3) uint8."""
        return {"pixel_values": self._pixels(image)[None]}

    def text(self, ids: Sequence[int]) -> str:
        """Returns ids as text; special tokens by name, nothing between the tags of an image."""
        return self.tokenizer.decode(ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of an answer in pieces; see `Processor.stream`."""
        return self.tokenizer.stream(ids, skip_special=True, keep=self.shown_ids)

    def decode(self, ids: Sequence[int], conversation: Conversation) -> Prediction:
        """Converts generated ids, up to the first stop id, to a prediction.

        Boxes are taken to be on the last image of the prompt.
        """
        answer = takewhile(lambda token_id: token_id not in self.stop_ids, ids)
        text = self.tokenizer.decode(answer, skip_special=True, keep=self.shown_ids)
        return self.read(text.strip(), conversation)

    def read(self, text: str, conversation: Conversation) -> Prediction:
        """Converts the text of an answer to a prediction."""
        images = conversation.prompt().images
        parts = objects_from_tags(text, image=max(len(images) - 1, 0))
        if images:
            parts = [_in_pixels(part, images) for part in parts]
        return Prediction(
            conversation=conversation,
            text=text,
            parts=tuple(parts),
            reference=self._reference(conversation),
        )

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Returns the ids of each option of a multiple-choice conversation.

        A raw prompt ends with a word, so that a space is written before the option.
        """
        before = " " if self.template == "raw" else ""
        return [self._encode(before + option) for option in conversation.options]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allowed_special=self.special_tokens)

    def _reference(self, conversation: Conversation) -> str | None:
        if conversation.answer is None:
            return None
        images_before = len(conversation.prompt().images)
        reference = ""
        for item in self._items(conversation.answer, images_before, conversation.images):
            if isinstance(item, Tag):
                reference += item.value
            elif isinstance(item, int):
                reference += "<img></img>"
            else:
                reference += item
        return reference

    def _pieces(self, conversation: Conversation, prompt: bool) -> list[Piece]:
        turns: Sequence[Turn] = conversation.prompt().turns if prompt else conversation.turns
        for number, turn in enumerate(turns, 1):
            self._check_text(number, turn)
        if self.template == "chatml":
            turns = with_system(turns, self.system)
        messages: list[Message] = []
        images_before = 0
        for turn in turns:
            body = list(self._body(turn, images_before, conversation.images))
            messages.append(Message(turn.role, body))
            images_before += sum(isinstance(part, ImageSource) for part in turn.parts)
        if self.template == "raw":
            pieces = list(self._render_raw(messages))
        else:
            if prompt:
                messages = self.chatml.recent(messages, self.max_window_size)
            pieces = list(self.chatml.render(messages, prompt=prompt))
        if prompt:
            return [piece._replace(supervised=False) for piece in pieces]
        return self._limited(pieces)

    def _check_text(self, number: int, turn: Turn) -> None:
        characters = 0
        for part in turn.parts:
            if isinstance(part, str):
                characters += len(part)
            elif isinstance(part, GroundedObject) and part.label is not None:
                characters += len(part.label)
        if characters <= MAX_TEXT:
            return
        excess = f"turn {number} has {characters} characters of text, more than {MAX_TEXT}"
        if self.too_long == "drop":
            raise Dropped(excess)
        raise DataError(f"{excess}; split the row, or leave it out with model.too_long=drop")

    def _render_raw(self, messages: Sequence[Message]) -> Iterator[Piece]:
        for role, body in messages:
            answer = role == "assistant"
            for piece in body:
                yield piece._replace(supervised=answer and piece.image is None)
            if answer:
                yield Piece([self.pad_id], supervised=True)

    def _body(
        self, turn: Turn, images_before: int, images: Sequence[ImageSource]
    ) -> Iterator[Piece]:
        """Yields the content of a turn.

        Adjacent texts are tokenized together. Only tags and images become special ids.
        """
        special, text = self.tokenizer.special, ""
        for item in self._items(turn, images_before, images):
            if isinstance(item, str):
                text += item
                continue
            if text:
                yield Piece(self._encode(text))
            text = ""
            if isinstance(item, Tag):
                yield Piece([special[item.value]])
            else:
                padding = [special["<imgpad>"]] * self.tokens_per_image
                yield Piece([special["<img>"], *padding, special["</img>"]], image=item)
        if text:
            yield Piece(self._encode(text))

    def _items(
        self, turn: Turn, images_before: int, images: Sequence[ImageSource]
    ) -> Iterator[str | Tag | int]:
        """Yields a turn as texts, tags, and images by index."""
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

    def _limited(self, pieces: list[Piece]) -> list[Piece]:
        """Applies `max_length` to a training sample, and checks that tokens are supervised."""
        has_answer = any(piece.supervised for piece in pieces)
        length = sum(len(piece.ids) for piece in pieces)
        excess = None
        if self.max_length and length > self.max_length:
            excess = f"{length} tokens are more than model.max_length={self.max_length}"
            if self.too_long == "drop":
                raise Dropped(excess)
            if self.too_long == "error":
                raise DataError(
                    f"{excess}; raise it, or set model.too_long=drop, truncate_left or "
                    f"truncate_right"
                )
            truncate = truncate_left if self.too_long == "truncate_left" else truncate_right
            pieces = truncate(pieces, self.max_length)
        if not has_answer:
            raise DataError(
                "no answer to learn from: the row has no answer; give it one, or remove the row"
            )
        # The first token has nothing before it that could predict it.
        if not any(piece.supervised for piece in pieces[1:]):
            if excess:
                raise Dropped(
                    f"{excess}, and model.too_long={self.too_long} leaves no answer of the row"
                )
            raise DataError("no answer to learn from: no token precedes the only one of the row")
        return pieces

    def _sample(self, conversation: Conversation, pieces: Sequence[Piece]) -> Sample:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        images: list[ImageSource] = []
        for piece in pieces:
            if piece.image is not None:
                first = len(ids) + 1  # after <img>
                positions += range(first, first + self.tokens_per_image)
                images.append(conversation.images[piece.image])
            ids += piece.ids
            labels += piece.ids if piece.supervised else [IGNORED] * len(piece.ids)
        return Sample(
            conversation=conversation,
            input_ids=torch.tensor(ids, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            vision_positions=torch.tensor(positions, dtype=torch.int64),
            vision=self._vision(images),
            images=tuple(images),
        )

    def _vision(self, images: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        features = self.features(images) if self.features is not None else None
        if features is not None:
            return {"vision_features": torch.stack(features) if features else torch.empty(0)}
        if images:
            return {"pixel_values": torch.stack([self._pixels(image) for image in images])}
        nothing = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
        return {"pixel_values": nothing}

    def _pixels(self, image: ImageSource) -> torch.Tensor:
        return resize_image(image.open(), self.image_size)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}")


def _check_special_tokens(names: Sequence[str]) -> None:
    """Raises an error unless `names` are extra tokens: roles and ends of turns stay unforgeable."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"data.special_tokens is a list of names such as <|extra_0|>, got {names!r}"
        )
    for name in names:
        if name not in EXTRAS:
            raise ValueError(
                f"data.special_tokens: {name!r} cannot be let through; only {EXTRAS[0]} to "
                f"{EXTRAS[-1]} can, because rows could otherwise forge roles, ends of turns and "
                f"images"
            )


def _in_pixels(part: Part, images: Sequence[ImageSource]) -> Part:
    return object_in_frame(part, "pixel", images) if isinstance(part, GroundedObject) else part
