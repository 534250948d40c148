"""The answer type of the Python API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwenvl_lit.types import GroundedObject, Part, Prediction


class Answer(str):
    """The text of an answer in the family's markup, with its parsed parts, token counts and times.

    Args:
        prediction: the parsed answer with its conversation. Boxes are in pixels of the images.
        prompt_tokens: the number of tokens of the prompt, including those of images.
        ids: the generated tokens, without the end-of-turn token.
        seconds: the time from the question to the end of the answer. For a batch of questions, the
            time to the end of the last answer.
        first_seconds: the time from the question to the first token. None for a batch.
    """

    def __new__(cls, prediction: Prediction, *others: Any) -> Answer:
        return super().__new__(cls, prediction.text)

    def __init__(
        self,
        prediction: Prediction,
        prompt_tokens: int,
        ids: Sequence[int],
        seconds: float,
        first_seconds: float | None = None,
    ):
        self.prediction = prediction
        self.prompt_tokens = prompt_tokens
        self.ids = tuple(ids)
        self.seconds = seconds
        self.first_seconds = first_seconds

    def __getnewargs__(self):  # called by `copy` and `pickle`
        tokens = (self.prompt_tokens, self.ids)
        return (self.prediction, *tokens, self.seconds, self.first_seconds)

    @property
    def new_tokens(self) -> int:
        """The number of generated tokens, without the end-of-turn token."""
        return len(self.ids)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The texts and objects of the answer, in order."""
        return self.prediction.parts

    @property
    def objects(self) -> list[GroundedObject]:
        """The objects of the answer.

        Boxes are in pixels of their image. If the conversation has no image, boxes are in another
        frame, which `frame` names.
        """
        return [part for part in self.parts if isinstance(part, GroundedObject)]
