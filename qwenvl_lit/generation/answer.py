"""A model's answer as Python sees it: text with its parse and its measurements."""

from __future__ import annotations

from qwenvl_lit.types import GroundedObject, Part, Prediction


class Answer(str):
    """The text of an answer, in the family's markup, with its parse and its measurements.

    Args:
        prediction: the answer with its conversation; boxes are in pixels of its images.
        prompt_tokens: tokens of the prompt, those of images included.
        new_tokens: generated tokens, without the end-of-turn token.
        seconds: from the question to the whole answer; in a batch, to all answers of the batch.
        first_seconds: from the question to the first token; None in a batch.
    """

    def __new__(cls, prediction: Prediction, *measurements: float | None) -> Answer:
        return super().__new__(cls, prediction.text)

    def __init__(
        self,
        prediction: Prediction,
        prompt_tokens: int,
        new_tokens: int,
        seconds: float,
        first_seconds: float | None = None,
    ):
        self.prediction = prediction
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.seconds = seconds
        self.first_seconds = first_seconds

    def __getnewargs__(self):  # for copies and pickles
        counts = (self.prompt_tokens, self.new_tokens)
        return (self.prediction, *counts, self.seconds, self.first_seconds)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The answer as text and objects, in order."""
        return self.prediction.parts

    @property
    def objects(self) -> list[GroundedObject]:
        """The objects of the answer.

        Boxes are in pixels; without an image in the conversation, on the grid of 0..999.
        """
        return [part for part in self.parts if isinstance(part, GroundedObject)]
