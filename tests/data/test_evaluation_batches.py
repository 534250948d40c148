"""What the batches of a test depend on, from rows that are not encoded yet."""

import numpy as np
from tiny import tiny_family

from qwenvl_lit.data.evaluation_batches import (
    DEFAULT_ROWS,
    UNKNOWN_ANSWER,
    BatchChoice,
    plan_batches,
    prompt_sizes,
    row_sizes,
)
from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn


def row(question: str = "q", answer: str | None = None, images: int = 0, **options) -> Conversation:
    sources = [ImageSource(f"{index}.png") for index in range(images)]
    turns = [Turn(role="user", parts=(*sources, question))]
    if answer is not None:
        turns.append(Turn(role="assistant", parts=(answer,)))
    return Conversation(id=question, turns=tuple(turns), **options)


class Broken(list):
    """Rows of which the second cannot be read."""

    def __getitem__(self, index):
        if index == 1:
            raise DataError("broken")
        return super().__getitem__(index)


def test_prompts_are_measured_in_characters_and_answers_in_expected_tokens():
    rows = [
        row("q" * 640, "a" * 41),
        row("q" * 63, references=("a" * 8, "a" * 100)),
        row(images=2),
        row(options=("yes", "no")),
    ]
    sizes = prompt_sizes(rows)
    assert sizes.lengths.tolist() == [10, 0, 32, 0]
    assert sizes.answers.tolist() == [11, 25, UNKNOWN_ANSWER, 0]
    assert [len(part) for part in prompt_sizes([])] == [0, 0]


def test_rows_that_cannot_be_read_are_left_to_the_loader():
    rows = Broken([row("q" * 64), row(), row()])
    assert prompt_sizes(rows).lengths.tolist() == [1, 0, 0]
    processor = tiny_family().processor()
    assert row_sizes(rows, [0, 1], np.array([1, 9]), processor, answered=True).tokens > 30


def test_the_longest_rows_are_encoded_to_measure_a_set():
    processor = tiny_family().processor()
    rows = [row(f"{'x' * length}", "yes") for length in range(30)]
    rows[29] = row("x" * 29, "yes", images=3)
    lengths = prompt_sizes(rows).lengths
    prompts = row_sizes(rows, range(30), lengths, processor, answered=True)
    longest = processor.length(rows[29], prompt=True)
    assert (prompts.rows, prompts.tokens) == (30, longest.tokens)
    assert prompts.image_tokens == longest.image_tokens == 3 * processor.tokens_per_image
    assert (prompts.supervised, prompts.answered, prompts.options) == (0, True, False)
    of_rank = row_sizes(rows, [3, 5], lengths, processor, answered=False)
    length = processor.length(rows[5])
    assert (of_rank.rows, of_rank.tokens, of_rank.supervised) == (2, *length[:2])


def test_a_plan_has_the_steps_to_expect_of_each_batch():
    rows = [row("q" * 256, "a" * 4 * tokens) for tokens in (3, 9, 5, 40, 1)]
    sizes = prompt_sizes(rows)
    asked = []

    def choose(row_sizes):
        asked.append(row_sizes)
        return BatchChoice(rows=2, reason="two")

    options = {"processor": tiny_family().processor(), "choose": choose}
    order = np.array([4, 3, 2, 0])
    plan = plan_batches(rows, order, sizes.lengths, sizes, batch_size="auto", **options)
    assert (plan.indices, plan.batches.rows) == ([4, 3, 2, 0], 2)
    assert (plan.prompt_tokens, plan.answer_tokens) == (4 * 64, (40, 5))
    assert [sizes.rows for sizes in asked] == [4]
    given = plan_batches(rows, order, sizes.lengths, sizes, batch_size=3, **options)
    assert (given.batches, given.answer_tokens) == (BatchChoice(rows=3, reason=""), (40, 3))
    assert len(asked) == 1
    loss = plan_batches(rows, order, sizes.lengths, None, batch_size=3, **options)
    assert (loss.prompt_tokens, loss.answer_tokens) == (0, ())
    options["choose"] = None
    plan = plan_batches(rows, order, sizes.lengths, sizes, batch_size="auto", **options)
    assert plan.batches.rows == DEFAULT_ROWS
