"""A model of your own: Qwen-VL with another prompt template, `Question: ... Answer: ...`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qwenvl_lit.models.chatml import Message, Piece
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer

TITLES = {"system": "", "user": "Question: ", "assistant": "Answer: "}


class QuestionAnswerProcessor(QwenVLProcessor):
    """Writes turns as lines with a title. An answer ends with `<|endoftext|>`."""

    def __init__(self, tokenizer: QwenTokenizer, **settings: Any):
        super().__init__(tokenizer, **settings)
        self.stop_ids = (tokenizer.pad_id,)

    def _render(self, messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        """Yields the token ids of a conversation, with those that are supervised marked."""
        if prompt and self.max_window_size:
            messages = self.chatml.recent(messages, self.max_window_size)
        for message in messages:
            answer = message.role == "assistant"
            yield Piece(self._encode(TITLES[message.role]))
            for piece in message.body:  # texts, tags and images
                yield piece._replace(supervised=answer and piece.image is None)
            yield Piece([self.pad_id] if answer else self._encode("\n"), supervised=answer)
        if prompt:
            yield Piece(self._encode(TITLES["assistant"]))

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the ids: token lengths in the cache are kept for each value of it."""
        return {**super().settings, "titles": list(TITLES.values())}


class QuestionAnswer(QwenVLFamily):
    """Reads the checkpoints of Qwen-VL and all others with its network."""

    processor_class = QuestionAnswerProcessor
