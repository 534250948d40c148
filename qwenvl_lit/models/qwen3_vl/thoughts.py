"""The `<think>...</think>` of answers, which models that think write before the answer itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwenvl_lit.types import DataError, Part, Turn

START = "<think>"
END = "</think>"
NO_THOUGHTS = f"\n{END}\n\n"  # ends the thoughts that a prompt has opened


def as_published(turns: Sequence[Turn]) -> list[Turn]:
    """Returns turns as the chat template of the Thinking checkpoints writes them.

    The last answer has thoughts, which may be empty. The thoughts of earlier answers are left out.
    """
    questions = [number for number, turn in enumerate(turns) if turn.role == "user"]
    last_question = questions[-1] if questions else -1
    written = []
    for number, turn in enumerate(turns):
        parts = turn.parts
        if turn.role == "assistant" and number == len(turns) - 1 > last_question:
            thoughts, answer = split_thoughts(parts)
            thoughts = _without_newlines(thoughts)
            answer = _without_newlines(answer, at_end=False)
            parts = (f"{START}\n", *thoughts, f"\n{END}\n\n", *answer)
        elif turn.role == "assistant":
            thoughts, answer = split_thoughts(parts)
            parts = _without_newlines(answer, at_end=False) if thoughts else answer
        written.append(replace(turn, parts=tuple(parts)))
    return written


def split_thoughts(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Returns what comes before and after the last `</think>`, without the tags.

    Without `</think>`, everything is the answer.
    """
    for number in reversed(range(len(parts))):
        part = parts[number]
        if not isinstance(part, str) or END not in part:
            continue
        before, _, after = part.rpartition(END)
        thoughts = [*parts[:number], before]
        first = thoughts[0]
        if isinstance(first, str):
            thoughts[0] = first.lstrip().removeprefix(START) if START in first else first
        return thoughts, [after, *parts[number + 1 :]]
    return [], list(parts)


def check_closed(turns: Sequence[Turn]) -> None:
    """Raises a `DataError` if an answer opens thoughts that it does not close."""
    for number, turn in enumerate(turns, 1):
        text = "".join(part for part in turn.parts if isinstance(part, str))
        if turn.role == "assistant" and START in text.rpartition(END)[2]:
            raise DataError(
                f"the {START} in turn {number} is not closed: close it with {END}, or set "
                "model.think=supervise"
            )


def thoughts_in(text: str) -> str | None:
    """Returns the thoughts of an answer without their tags; None if there are none."""
    before = text.rpartition(END)[0]
    return before.strip().removeprefix(START).strip() or None


def without_thoughts(text: str) -> str:
    """Returns the text of an answer after its thoughts."""
    return text.rpartition(END)[2].strip() if END in text else text


def _without_newlines(parts: Sequence[Part], *, at_end: bool = True) -> list[Part]:
    """Returns parts without newlines at the beginning, and at the end."""
    stripped = list(parts)
    if stripped and isinstance(stripped[0], str):
        stripped[0] = stripped[0].lstrip("\n")
    if at_end and stripped and isinstance(stripped[-1], str):
        stripped[-1] = stripped[-1].rstrip("\n")
    return stripped
