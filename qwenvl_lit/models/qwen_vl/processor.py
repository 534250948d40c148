"""Converts conversations to what Qwen-VL reads, and its answers back.

An image is a span of 256 tokens, a box is tagged text, and turns are ChatML or plain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from qwenvl_lit.grounding import Tag, object_in_frame, objects_from_tags, tags_from_object
from qwenvl_lit.models.chat_processor import NAMED_IMAGE, ChatProcessor, check_choice
from qwenvl_lit.models.chatml import Message, Piece
from qwenvl_lit.models.qwen_vl.image_processing import resize_image
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.models.unit_text import objects_from_text, text_from_object
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import (
    Conversation,
    GroundedObject,
    ImageSource,
    Part,
    Prediction,
    Turn,
)

Template = Literal["chatml", "raw"]


class QwenVLProcessor(ChatProcessor):
    """Converts conversations to tensors, and generated ids to text and boxes.

    With the chat template, `Picture k: ` is written before image k and a newline after it, unless
    the text before it ends with such words already.

    Args:
        tokens_per_image: length of an image's span, without its two tags.
        image_size: width and height of the resized images, in pixels.
        template: "chatml"; or "raw" for the base model: the texts one after the other, and an
            answer ends with `<|endoftext|>`. It has no system message, and no exchanges are left
            out. All answers and their `<|endoftext|>` are supervised.
        max_window_size, settings: see `ChatProcessor`.
    """

    join_features = staticmethod(torch.stack)
    collate_vision = staticmethod(concatenate_vision)

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        *,
        tokens_per_image: int = 256,
        image_size: int = 448,
        template: Template = "chatml",
        max_window_size: int | None = 6144,
        **settings: Any,
    ):
        check_choice("template", template, get_args(Template))
        super().__init__(tokenizer, max_window_size=max_window_size, **settings)
        self.tokenizer: QwenTokenizer = tokenizer
        self.tokens_per_image = tokens_per_image
        self.image_size = image_size
        self.template = template
        self.stop_ids = (tokenizer.pad_id,)
        if template == "chatml":
            self.stop_ids = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.pad_id)
        self.continues_text = template == "raw"
        # As the published evaluation asks the base model, and as rows for chat ask
        if self.boxes is None:
            self.find_prompt = (
                "{image}{question}" if template == "raw" else "{image}Find {question}"
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
            **super().settings,
            "tokens_per_image": self.tokens_per_image,
            "image_size": self.image_size,
            "template": self.template,
        }

    @property
    def image_settings(self) -> dict[str, Any]:
        """Plain data that determines the result of `image_vision`."""
        return {"image_size": self.image_size}

    def read(self, text: str, conversation: Conversation) -> Prediction:
        """Converts the text of an answer to a prediction."""
        images = conversation.prompt().images
        last = max(len(images) - 1, 0)
        parts: list[Part] = []
        for part in objects_from_tags(text, image=last):
            if self.boxes is not None and isinstance(part, str):
                parts += objects_from_text(part, image=last)
            else:
                parts.append(part)
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

    def _prepared(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        return turns if self.template == "raw" else self._with_system(turns)

    def _render(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        if self.template == "raw":
            return self._render_raw(messages)
        return super()._render(messages, prompt)

    def _render_raw(self, messages: Sequence[Message]) -> Iterator[Piece]:
        for message in messages:
            answer = message.role == "assistant"
            for piece in message.body:
                yield piece._replace(supervised=answer and piece.image is None)
            if answer:
                yield Piece([self.pad_id], supervised=True)

    def _message(self, turn: Turn, images_before: int, images: Sequence[ImageSource]) -> Message:
        return Message(turn.role, list(self._body(turn, images_before, images)))

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
            if isinstance(part, GroundedObject) and self.boxes is not None:
                yield text_from_object(part, images, self.boxes)
            elif isinstance(part, GroundedObject):
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

    def _pixels(self, images: Sequence[ImageSource]) -> dict[str, torch.Tensor]:
        """Returns the resized images, (N, image_size, image_size, 3) uint8."""
        if not images:
            nothing = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
            return {"pixel_values": nothing}
        resized = [resize_image(image.open(), self.image_size) for image in images]
        return {"pixel_values": torch.stack(resized)}


def _in_pixels(part: Part, images: Sequence[ImageSource]) -> Part:
    return object_in_frame(part, "pixel", images) if isinstance(part, GroundedObject) else part
