import asyncio
import time

from serving.served import PROCESSOR, ids_of

from qwenvl_lit.generation.request import Request, Token
from qwenvl_lit.serving.answers import Answers
from qwenvl_lit.serving.metrics import Metrics
from qwenvl_lit.serving.text import AnswerText
from qwenvl_lit.types import Conversation, Turn


class Burst:
    """An engine that sends whole answers at once."""

    def __init__(self, *answers: str):
        self.answers = list(answers)

    def submit(self, request, on_tokens):
        for token_id in ids_of(self.answers.pop(0)):
            on_tokens([Token(token_id)], None)
        on_tokens((), "stop")
        return self

    def cancel(self):
        raise AssertionError("rows that have ended are not cancelled")


def test_what_arrives_while_the_loop_is_busy_is_one_piece_of_each_row():
    question = Conversation(id="a", turns=(Turn(role="user", parts=("a",)),))
    prompt = PROCESSOR.encode(question, prompt=True)

    async def pieces():
        answers = Answers(
            Burst("one two", "three"),
            [Request(prompt=prompt, max_new_tokens=9)] * 2,
            make_text=lambda: AnswerText(PROCESSOR.tokenizer.decode),
            metrics=Metrics(running=lambda: 0, waiting=lambda: 0),
            start=time.perf_counter(),
        )
        await asyncio.to_thread(answers.submit)
        found = [piece async for piece in answers.pieces()]
        answers.cancel()
        return found

    found = asyncio.run(pieces())
    assert [(piece.row, piece.text) for piece in found] == [(0, "one two"), (1, "three")]
    assert [piece.finish_reason for piece in found] == ["stop", "stop"]
    assert [len(piece.tokens) for piece in found] == [len(ids_of("one two")), len(ids_of("three"))]
