"""Converts conversations to what Qwen2.5-VL and Qwen3-VL read, and their answers back.

An image is a span of as many tokens as its size needs, objects are JSON, and turns are ChatML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from qwenvl_lit.grounding import object_in_frame
from qwenvl_lit.models.chat_processor import NAMED_IMAGE, ChatProcessor, check_choice
from qwenvl_lit.models.chatml import DEFAULT_SYSTEM, NO_SYSTEM, Message, Piece
from qwenvl_lit.models.qwen3_vl.boxes import (
    BETWEEN_OBJECTS,
    THOUSANDTHS,
    Scale,
    box_numbers,
    list_from_objects,
    objects_from_text,
    text_from_object,
)
from qwenvl_lit.models.qwen3_vl.images import ImageProcessor
from qwenvl_lit.models.qwen3_vl.positions import axis_positions
from qwenvl_lit.models.qwen3_vl.thoughts import (
    END,
    NO_THOUGHTS,
    START,
    as_published,
    check_closed,
    thoughts_in,
    without_thoughts,
)
from qwenvl_lit.models.qwen3_vl.tokenizer import Qwen2Tokenizer
from qwenvl_lit.models.qwen3_vl.tower import VisionConfig, tower_inputs
from qwenvl_lit.models.unit_text import objects_from_text as objects_from_unit_text
from qwenvl_lit.models.unit_text import text_from_object as unit_text_from_object
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import (
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Part,
    Prediction,
    Sample,
    Turn,
)

Scaling = Literal["pixels", "thousandths"]
Think = Literal["supervise", "mask"]

IMAGE_SPAN = "<|vision_start|><|image_pad|><|vision_end|>"
# A token may hold the end of the tag and the newlines behind it.
_THOUGHTS = re.compile(rf".*{END}(?:\s*[\r\n]+)?", re.DOTALL)


class Qwen3VLProcessor(ChatProcessor):
    """Converts conversations to tensors, and generated ids to text and boxes.

    `Picture k: ` right before an image is left out: it is Qwen-VL's markup.

    Args:
        images: resizes images and cuts them into patches.
        vision_config: the config of the vision tower.
        scaling: the numbers that boxes are written in: "pixels" of the resized image, as for
            Qwen2.5-VL, or "thousandths" of the image, as for Qwen3-VL.
        thinks: whether the model is one of the Thinking checkpoints. Their prompts open the
            thoughts, and the last answer of a row has thoughts, which may be empty.
        think: "supervise" also supervises the thoughts of answers, "mask" only what follows them.
        settings: see `ChatProcessor`.
    """

    official_markup = False
    own_box_form = "Qwen2.5-VL and Qwen3-VL (JSON with bbox_2d)"
    find_prompt = (
        '{image}Locate every object that matches the description "{question}" in the image. '
        "Report bbox coordinates in JSON format."
    )

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        images: ImageProcessor,
        vision_config: VisionConfig,
        *,
        scaling: Scaling,
        thinks: bool = False,
        think: Think = "supervise",
        **settings: Any,
    ):
        check_choice("think", think, get_args(Think))
        super().__init__(tokenizer, **settings)
        self.images = images
        self.vision_config = vision_config
        self.scaling = scaling
        self.thinks = thinks
        self.think = think
        self.default_system = DEFAULT_SYSTEM if scaling == "pixels" else NO_SYSTEM

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data that determines ids and labels; see `Processor.settings`."""
        own = {"scaling": self.scaling, "thinks": self.thinks, "think": self.think}
        return {**super().settings, **own, "images": self.images.settings}

    @property
    def image_settings(self) -> dict[str, Any]:
        """Plain data that determines the result of `image_vision`."""
        return self.images.settings

    def text(self, ids: Sequence[int]) -> str:
        """Returns ids as text, with special tokens by name and one for all tokens of an image."""
        pad = self.tokenizer.special["<|image_pad|>"]
        shown = []
        for token_id in ids:
            if token_id != pad or not shown or shown[-1] != pad:
                shown.append(token_id)
        return self.tokenizer.decode(shown)

    def read(self, text: str, conversation: Conversation) -> Prediction:
        """Converts the text of an answer to a prediction, with its thoughts apart."""
        images = conversation.prompt().images
        last = max(len(images) - 1, 0)
        answer = without_thoughts(text)
        if self.boxes is None:
            parts = objects_from_text(answer, self._scale(last, images), image=last)
        else:
            parts = objects_from_unit_text(answer, image=last)
        if images:
            parts = tuple(_in_pixels(part, images) for part in parts)
        return Prediction(
            conversation=conversation,
            text=answer,
            parts=parts,
            reference=self._reference(conversation),
            thoughts=thoughts_in(text),
        )

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Returns the ids of each option of a multiple-choice conversation, without thoughts."""
        before = NO_THOUGHTS if self.thinks else ""
        return [self._encode(before + option) for option in conversation.options]

    def collate_vision(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns the vision tensors of a batch; see `Processor.collate_vision`."""
        vision: dict[str, Any] = concatenate_vision(samples)
        sizes = vision.pop("image_sizes", None)
        if sizes is None or not len(sizes):
            return vision
        return vision | tower_inputs([tuple(size) for size in sizes.tolist()], self.vision_config)

    def _pixels(self, images: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        """Returns the patches of images, uint8, and their heights and widths in patches."""
        if not images:
            patch = 3 * self.images.patch_size**2
            nothing = torch.empty(0, patch, dtype=torch.uint8)
            return {"pixel_values": nothing, "image_sizes": torch.empty(0, 2, dtype=torch.int64)}
        patches = [self.images.patches(image) for image in images]
        sizes = [self.images.grid(image) for image in images]
        return {"pixel_values": torch.cat(patches), "image_sizes": torch.tensor(sizes)}

    def _positions(self, pieces: Sequence[Piece], images: Sequence[ImageSource]) -> torch.Tensor:
        """Returns positions on the axes time, height and width, (3, T)."""
        spans = []
        length = 0
        remaining = iter(images)
        for piece in pieces:
            if piece.image is not None:
                height, width = self.images.grid(next(remaining))
                merge = self.images.merge_size
                spans.append((length + 1, height // merge, width // merge))
            length += len(piece.ids)
        return axis_positions(length, spans)

    def _pieces(self, conversation: Conversation, prompt: bool) -> list[Piece]:
        if self.think == "mask" and not prompt:
            check_closed(conversation.turns)
        return super()._pieces(conversation, prompt)

    def _prepared(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        turns = self._with_system(turns)
        return as_published(turns) if self.thinks else turns

    def _render(self, messages, prompt: bool) -> Iterator[Piece]:
        yield from super()._render(messages, prompt)
        if prompt and self.thinks:
            yield Piece(self._encode(f"{START}\n"))

    def _message(self, turn: Turn, images_before: int, images: Sequence[ImageSource]) -> Message:
        """Returns a turn with encoded content. Adjacent texts are tokenized together.

        As in the published chat template, so are the newline behind a role and the text of a
        question. An answer is tokenized on its own, as it is generated.
        """
        items: list[str | int] = []
        for item in self._items(turn, images_before, images):
            if isinstance(item, str) and items and isinstance(items[-1], str):
                items[-1] += item
            else:
                items.append(item)
        masked = 0  # items at the beginning that are thoughts
        has_newline = False
        if turn.role != "assistant":
            if items and isinstance(items[0], str):
                items[0] = "\n" + items[0]
                has_newline = True
        elif self.think == "mask":
            masked = _split_at_answer(items)
        special, body = self.tokenizer.special, []
        for number, item in enumerate(items):
            if isinstance(item, str):
                body.append(Piece(self._encode(item), masked=number < masked))
            else:
                padding = [special["<|image_pad|>"]] * self.images.tokens(images[item])
                span = [special["<|vision_start|>"], *padding, special["<|vision_end|>"]]
                body.append(Piece(span, image=item))
        return Message(turn.role, body, has_newline)

    def _items(
        self, turn: Turn, images_before: int, images: Sequence[ImageSource]
    ) -> Iterator[str | int]:
        """Yields a turn as texts, and images by index.

        The objects of an answer that follow each other, or have only blanks and commas between
        them, are one list.
        """
        index = images_before
        objects: list[GroundedObject] = []
        between = ""  # text behind the last object
        for part in _without_names(turn.parts):
            if isinstance(part, GroundedObject) and self.boxes is not None:
                part = unit_text_from_object(part, images, self.boxes)
            is_object = isinstance(part, GroundedObject) and bool(part.boxes)
            if is_object and turn.role == "assistant":
                objects.append(part)
                between = ""
                continue
            if objects and isinstance(part, str) and BETWEEN_OBJECTS.fullmatch(part):
                between += part
                continue
            if objects:
                yield self._list(objects, images) + between
                objects, between = [], ""
            if isinstance(part, str):
                yield part
            elif isinstance(part, GroundedObject):
                yield text_from_object(part, self._numbers(part, images))
            else:
                yield index
                index += 1
        if objects:
            yield self._list(objects, images) + between

    def _list(self, objects: Sequence[GroundedObject], images: Sequence[ImageSource]) -> str:
        return list_from_objects(objects, [self._numbers(obj, images) for obj in objects])

    def _numbers(self, obj: GroundedObject, images: Sequence[ImageSource]) -> list[list[int]]:
        if not obj.boxes:
            return []
        scale = self._scale(obj.image, images)
        if scale is None:
            raise DataError(
                f"object {obj.label!r} names image {obj.image}, counted from 0, of {len(images)}; "
                "check its `image`"
            )
        return box_numbers(obj, images, scale)

    def _scale(self, image: int, images: Sequence[ImageSource]) -> Scale | None:
        """Returns the size of an image as boxes are written; None: there is no such image."""
        if self.scaling == "thousandths":
            return Scale(THOUSANDTHS, THOUSANDTHS)
        if not 0 <= image < len(images):
            return None
        return Scale(*self.images.resized(images[image]))

    def _reference(self, conversation: Conversation) -> str | None:
        if conversation.answer is None:
            return None
        images_before = len(conversation.prompt().images)
        text = ""
        for item in self._items(conversation.answer, images_before, conversation.images):
            text += item if isinstance(item, str) else IMAGE_SPAN
        return without_thoughts(text)


def _without_names(parts: Sequence[Part]) -> list[Part]:
    """Returns parts without the names of images that Qwen-VL's markup has."""
    kept = list(parts)
    for index, part in enumerate(parts[1:]):  # parts[index] is before it
        before = parts[index]
        if isinstance(part, ImageSource) and isinstance(before, str):
            kept[index] = NAMED_IMAGE.sub("", before)
    return [part for part in kept if part != ""]


def _split_at_answer(items: list[str | int]) -> int:
    """Splits the item that ends the thoughts, and returns the number of items of the thoughts."""
    for number, item in reversed(list(enumerate(items))):
        if isinstance(item, str) and (thoughts := _THOUGHTS.match(item)):
            items[number : number + 1] = [thoughts[0], item[thoughts.end() :]]
            return number + 1
    return 0


def _in_pixels(part: Part, images: Sequence[ImageSource]) -> Part:
    return object_in_frame(part, "pixel", images) if isinstance(part, GroundedObject) else part
