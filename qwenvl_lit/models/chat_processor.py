"""The base class of processors whose prompts are ChatML."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, ClassVar, Literal, get_args

import torch

from qwenvl_lit.bounds import check_number
from qwenvl_lit.models.byte_pairs import MAX_BLANKS, BytePairTokenizer
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
from qwenvl_lit.models.unit_text import FIND_PROMPTS, UNIT_FORM
from qwenvl_lit.settings import BoxForm
from qwenvl_lit.types import (
    Conversation,
    DataError,
    Dropped,
    GroundedObject,
    ImageSource,
    Length,
    Prediction,
    Sample,
    Turn,
)

IGNORED = -100  # the label of a token that is not supervised
MAX_TEXT = MAX_BLANKS  # characters of a turn

# Text right before an image that names it, as Qwen-VL's markup does.
NAMED_IMAGE = re.compile(r"Picture\s*\d+\s*[:：]\s*$")

TooLong = Literal["error", "drop", "truncate_left", "truncate_right"]


@contextmanager
def _locating(conversation: Conversation) -> Iterator[None]:
    """Prefixes errors with the row's file, line and id."""
    try:
        yield
    except DataError as error:
        raise conversation.located(error) from error


class ChatProcessor(ABC):
    """Converts conversations to tensors, and generated ids to text.

    A subclass writes the content of a turn, makes the vision tensors, and reads answers.

    Args:
        system: the system message of conversations without one. None is the model's default, ""
            an empty message, and "none" no message.
        supervise: see `ChatML`.
        max_length: largest number of tokens of a training sample.
        too_long: what happens to longer samples. "error" raises, "drop" leaves the row out,
            "truncate_left" keeps the last tokens and "truncate_right" the first ones; every image
            is kept as a whole or not at all. A turn with more than `MAX_TEXT` characters is
            dropped, or else an error.
        max_window_size: a prompt's system message and earlier exchanges have fewer tokens than
            this; the oldest exchanges are left out. None: all are kept.
        special_tokens: names of special tokens that text may hold. All other names of special
            tokens are plain text.
        boxes: how boxes are written, and read from answers: "unit_text" and "unit_points" as plain
            text, see `models.unit_text`. None: as the family was trained.
        features: computes or looks up the vision features of images, in place of their pixels.
            While it returns None, samples have pixels.
    """

    supports_packing = True
    join_features = staticmethod(torch.cat)  # makes a sample's features of those of its images
    default_system: str | None = None  # as `system`
    official_markup: ClassVar[bool] = True  # see `ChatML`
    continues_text = False
    own_box_form: str | None = None  # see `Processor`
    find_prompt: str

    def __init__(
        self,
        tokenizer: BytePairTokenizer,
        *,
        system: str | None = None,
        supervise: Supervise = "answers",
        max_length: int | None = None,
        too_long: TooLong = "error",
        max_window_size: int | None = None,
        special_tokens: Sequence[str] | None = None,
        boxes: BoxForm | None = None,
        features: FeatureSource | None = None,
    ):
        if boxes is not None:
            check_choice("boxes", boxes, get_args(BoxForm))
            self.own_box_form = UNIT_FORM
            self.find_prompt = FIND_PROMPTS[boxes]
        check_choice("supervise", supervise, get_args(Supervise))
        check_choice("too_long", too_long, get_args(TooLong))
        check_number("model.max_length", max_length, least=1, whole=True, optional=True)
        check_number("model.max_window_size", max_window_size, least=1, whole=True, optional=True)
        check_special_tokens(special_tokens or (), tokenizer.extras)
        self.tokenizer = tokenizer
        self.system = system
        self.supervise = supervise
        self.max_length = max_length
        self.too_long = too_long
        self.max_window_size = max_window_size
        self.special_tokens = tuple(special_tokens or ())
        self.boxes: BoxForm | None = boxes
        self.features = features
        self.chatml = ChatML(
            tokenizer.encode,
            start=tokenizer.im_start_id,
            end=tokenizer.im_end_id,
            supervise=supervise,
            official_markup=self.official_markup,
        )
        self.pad_id = tokenizer.pad_id
        self.stop_ids: tuple[int, ...] = (tokenizer.im_end_id, tokenizer.pad_id)

    @abstractmethod
    def _message(self, turn: Turn, images_before: int, images: Sequence[ImageSource]) -> Message:
        """Returns a turn with encoded content.

        Args:
            images_before: number of images in earlier turns.
            images: all images of the conversation.
        """

    @abstractmethod
    def _pixels(self, images: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        """Returns the vision tensors of a sample with these images, which are decoded here."""

    @abstractmethod
    def read(self, text: str, conversation: Conversation) -> Prediction:
        """Converts the text of an answer to a prediction."""

    def _prepared(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Returns the turns as they are written."""
        return turns

    def _positions(self, pieces: Sequence[Piece], images: Sequence[ImageSource]) -> Any:
        """Returns `Sample.position_ids`."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data that determines ids and labels; see `Processor.settings`."""
        return {
            "processor": type(self).__name__,
            "vocabulary": self.tokenizer.checksum,
            "system": self.system,
            "supervise": self.supervise,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "max_window_size": self.max_window_size,
            "special_tokens": self.special_tokens,
            "boxes": self.boxes,
        }

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Returns the ids, labels and images of a conversation.

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

        No image is decoded.

        Raises:
            DataError: as `encode`, except for images that cannot be decoded.
        """
        with _locating(conversation):
            pieces = self._pieces(conversation, prompt)
        tokens = supervised = image_tokens = 0
        for piece in pieces:
            tokens += len(piece.ids)
            if piece.supervised:
                supervised += len(piece.ids)
            if piece.image is not None:
                image_tokens += len(piece.ids) - 2
        # The first token has nothing before it that could predict it.
        return Length(tokens, supervised - pieces[0].supervised, image_tokens)

    def image_vision(self, image: ImageSource) -> dict[str, torch.Tensor]:
        """Returns the vision tensors of a sample that has this image only."""
        return self._pixels([image])

    def text(self, ids: Sequence[int]) -> str:
        """Returns ids as text, with special tokens by name."""
        return self.tokenizer.decode(ids)

    @property
    def shown_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that the text of an answer shows."""
        return tuple(self.tokenizer.special[name] for name in self.special_tokens)

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

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Returns the ids of each option of a multiple-choice conversation."""
        return [self._encode(option) for option in conversation.options]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allowed_special=self.special_tokens)

    def _pieces(self, conversation: Conversation, prompt: bool) -> list[Piece]:
        turns: Sequence[Turn] = conversation.prompt().turns if prompt else conversation.turns
        for number, turn in enumerate(turns, 1):
            self._check_text(number, turn)
        messages: list[Message] = []
        images_before = 0
        for turn in self._prepared(turns):
            messages.append(self._message(turn, images_before, conversation.images))
            images_before += sum(isinstance(part, ImageSource) for part in turn.parts)
        pieces = list(self._render(messages, prompt))
        if prompt:
            return [piece._replace(supervised=False) for piece in pieces]
        return self._limited(pieces)

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        system = self.default_system if self.system is None else self.system
        return with_system(turns, system)

    def _render(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        if prompt and self.max_window_size:
            messages = self.chatml.recent(messages, self.max_window_size)
        return self.chatml.render(messages, prompt=prompt)

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

    def _vision(self, images: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        features = self.features(images) if self.features is not None else None
        if features is None:
            return self._pixels(images)
        if not features:
            return {"vision_features": torch.empty(0)}
        return {"vision_features": self.join_features(features)}

    def _sample(self, conversation: Conversation, pieces: Sequence[Piece]) -> Sample:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        images: list[ImageSource] = []
        for piece in pieces:
            if piece.image is not None:
                positions += range(len(ids) + 1, len(ids) + len(piece.ids) - 1)  # without its tags
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
            position_ids=self._positions(pieces, images),
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}")


def check_special_tokens(names: Sequence[str], extras: Sequence[str]) -> None:
    """Raises an error unless `names` are in `extras`: roles and ends of turns stay unforgeable."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"data.special_tokens is a list of names such as {extras[0]}, got {names!r}"
        )
    for name in names:
        if name not in extras:
            shown = f"{extras[0]} to {extras[-1]}" if len(extras) > 8 else ", ".join(extras)
            raise ValueError(
                f"data.special_tokens: {name!r} cannot be let through; only {shown} "
                f"can, because rows could otherwise forge roles, ends of turns and images"
            )
