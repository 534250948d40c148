"""Prompts of Qwen-VL's published evaluation, for datasets that hold no questions of their own."""

from __future__ import annotations

import re
from typing import TypeVar

from qwenvl_lit.types import DataError

CAPTION_PROMPT = "{image}Describe the image in English:"
# `question` is the phrase as a grounded object; the model answers with its box.
REFERRING_PROMPT = "{image}{question}"
VQA_PROMPT = "{image}{question} Answer:"
CHOICE_PROMPT = "{image}Context: {hint}\nQuestion: {question}\nOptions: {options}\nAnswer:"

Value = TypeVar("Value")


def fill_prompt(prompt: str, **values: Value) -> tuple[str | Value, ...]:
    """Returns the parts of a turn: the text of `prompt`, with each `{name}` replaced by its value.

    >>> fill_prompt("Q: {question} A:", question="Why?")
    ('Q: ', 'Why?', ' A:')

    Raises:
        DataError: `prompt` does not contain each name exactly once.
    """
    pieces: list[str | Value] = [*re.split(rf"\{{({'|'.join(values)})\}}", prompt)]
    names = pieces[1::2]
    if sorted(names) != sorted(values):
        wanted = " and ".join(f"{{{name}}}" for name in values)
        raise DataError(f"`data.prompt` must contain {wanted} exactly once, got {prompt!r}")
    pieces[1::2] = [values[name] for name in names]
    return tuple(piece for piece in pieces if piece)
