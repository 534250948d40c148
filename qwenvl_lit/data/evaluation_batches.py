"""Plans the batches of validation, test and prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn

if TYPE_CHECKING:
    from qwenvl_lit.data.selection import Rows
    from qwenvl_lit.models.protocols import Processor

DEFAULT_ROWS = 8  # rows per batch if nothing chooses them
LENGTH_UNIT = 64  # characters
CHARACTERS_PER_TOKEN = 4  # of English text, roughly
IMAGE_CHARACTERS = 1024  # as many as 256 tokens
OBJECT_CHARACTERS = 32
UNKNOWN_ANSWER = 64  # tokens expected of an answer if no row says how long answers are
MEASURED_ROWS = 16  # of the longest rows of a set, so many are measured exactly


class PromptSizes(NamedTuple):
    """Estimates for each row of a set."""

    lengths: np.ndarray
    """(rows,) int64, of prompts in units of 64 characters: so coarse that a stable sort leaves
    questions about the same image together."""
    answers: np.ndarray  # (rows,) int64, tokens of the answers to expect; 0 if none is generated


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSizes:
    """The rows of a set that this rank evaluates, and the largest sizes among them."""

    rows: int
    tokens: int
    supervised: int  # tokens with a label; 0 for prompts
    image_tokens: int
    answered: bool  # whether rows are prompts to answer. Otherwise, their loss is computed.
    options: bool  # whether an answer is one of several options


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchChoice:
    """The number of rows that are evaluated together."""

    rows: int
    reason: str  # why there are not more, in a few words; "" if the config gives the number


ChooseBatches = Callable[[RowSizes], BatchChoice]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPlan:
    """The rows of a set that this rank evaluates, in order, and its batches."""

    indices: list[int]
    batches: BatchChoice
    prompt_tokens: int  # of all rows together, roughly; 0 if no answer is generated
    answer_tokens: tuple[int, ...]  # for each batch, the tokens to expect of its longest answer


def prompt_sizes(rows: Sequence[Conversation]) -> PromptSizes:
    """Estimates the sizes of prompts and answers without encoding them."""
    sizes = np.array([_sizes(rows, index) for index in range(len(rows))], dtype=np.int64)
    lengths, answers = sizes.reshape(-1, 2).T
    return PromptSizes(lengths // LENGTH_UNIT, answers)


def by_length(lengths: np.ndarray) -> np.ndarray:
    """Returns the order in which the longest rows come first: the peak of memory is at once."""
    return np.argsort(-lengths, kind="stable")


def plan_batches(
    rows: Rows,
    indices: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    sizes: PromptSizes | None,
    *,
    processor: Processor,
    batch_size: int | Literal["auto"],
    choose: ChooseBatches | None,
) -> EvaluationPlan:
    """Plans how the rows at `indices` are evaluated in this order.

    Args:
        lengths: (rows,) by which the longest rows are found.
        sizes: of the prompts, if rows are answered; None if their loss is computed.
        choose: chooses the batches if `batch_size` is "auto"; None: `DEFAULT_ROWS`.
    """
    indices = [int(index) for index in indices]
    batches = BatchChoice(rows=DEFAULT_ROWS, reason="")
    if batch_size != "auto":
        batches = BatchChoice(rows=batch_size, reason="")
    elif choose is not None:
        batches = choose(row_sizes(rows, indices, lengths, processor, answered=sizes is not None))
    prompt_tokens, longest = 0, []
    if sizes is not None:
        prompt_tokens = int(sizes.lengths[indices].sum()) * LENGTH_UNIT // CHARACTERS_PER_TOKEN
        for first in range(0, len(indices), batches.rows):
            longest.append(int(sizes.answers[indices[first : first + batches.rows]].max()))
    return EvaluationPlan(
        indices=indices,
        batches=batches,
        prompt_tokens=prompt_tokens,
        answer_tokens=tuple(longest),
    )


def row_sizes(
    rows: Rows, indices: Sequence[int], lengths: np.ndarray, processor: Processor, *, answered: bool
) -> RowSizes:
    """Measures the longest of the rows at `indices`, which `lengths` (rows,) tells.

    Rows that cannot be encoded are passed over: loading them reports the error.
    """
    longest = sorted(indices, key=lambda index: -lengths[index])[:MEASURED_ROWS]
    tokens, supervised, image_tokens, options = 1, 0, 0, False
    for index in longest:
        try:
            row = rows[index]
            length = processor.length(row, prompt=answered)
        except DataError:
            continue
        tokens, supervised = max(tokens, length.tokens), max(supervised, length.supervised)
        image_tokens = max(image_tokens, length.image_tokens)
        options = options or bool(row.options)
    return RowSizes(
        rows=len(indices),
        tokens=tokens,
        supervised=0 if answered else supervised,
        image_tokens=image_tokens,
        answered=answered,
        options=options,
    )


def _sizes(rows: Sequence[Conversation], index: int) -> tuple[int, int]:
    """Returns the characters of a prompt and the tokens to expect of its answer."""
    try:
        row = rows[index]
        prompt = row.prompt()
    except DataError:
        return 0, 0  # the error is raised when the row is loaded
    characters = sum(map(_characters, prompt.turns))
    if row.options:
        return characters, 0
    answers = [len(reference) for reference in row.references]
    if row.answer is not None:
        answers.append(_characters(row.answer))
    if not any(answers):
        return characters, UNKNOWN_ANSWER
    return characters, -(-max(answers) // CHARACTERS_PER_TOKEN)


def _characters(turn: Turn) -> int:
    characters = 0
    for part in turn.parts:
        if isinstance(part, str):
            characters += len(part)
        elif isinstance(part, ImageSource):
            characters += IMAGE_CHARACTERS
        else:
            characters += OBJECT_CHARACTERS
    return characters
