"""How images are asked about where a dataset holds no questions of its own: the prompts of Qwen-VL's published evaluation."""

from __future__ import annotations

import re

from qwenvl_lit.types import DataError, Part

CAPTION_PROMPT = "{image}Describe the image in English:"
REFERRING_PROMPT = "{image}{question}"  # `question` is the phrase as a grounded object; the model goes on with its box
VQA_PROMPT = "{image}{question} Answer:"
CHOICE_PROMPT = "{image}Context: {hint}\nQuestion: {question}\nOptions: {options}\nAnswer:"


def ask(prompt: str, **parts: Part) -> tuple[Part, ...]:
    """`prompt` as the parts of a turn, each `{name}` replaced by the part of that name.

    >>> ask("Q: {question} A:", question="Why?")
    ('Q: ', 'Why?', ' A:')

    Raises:
        DataError: a part is not in `prompt` exactly once.
    """
    pieces = re.split(rf"\{{({'|'.join(parts)})\}}", prompt)
    if sorted(pieces[1::2]) != sorted(parts):
        wanted = " and ".join(f"{{{name}}}" for name in parts)
        raise DataError(f"`data.prompt` says once where {wanted} stands, got {prompt!r}")
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return tuple(piece for piece in pieces if piece)
