"""Answers of the engine as the event loop sees them: pieces of n rows, which arrive interleaved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from qwenvl_lit.generation.continuous import ContinuousBatching
from qwenvl_lit.generation.request import Closed, Full, Handle, Request, Token
from qwenvl_lit.serving.errors import ApiError, shutting_down
from qwenvl_lit.serving.metrics import Metrics
from qwenvl_lit.serving.text import AnswerText


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What has arrived of one row."""

    row: int
    text: str
    tokens: Sequence[Token]
    finish_reason: str | None  # of the last piece


@dataclass(slots=True)
class Row:
    """One answer, so far."""

    text: AnswerText
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    latest: float | None = None  # time of the latest token


class Answers:
    """The answers to one prompt.

    Args:
        requests: one for each answer.
        make_text: makes what collects the text of an answer.
        start: the time of the request, on the clock `time.perf_counter`.
    """

    def __init__(
        self,
        engine: ContinuousBatching,
        requests: Sequence[Request],
        *,
        make_text: Callable[[], AnswerText],
        metrics: Metrics,
        start: float,
    ):
        self.rows = [Row(make_text()) for _ in requests]
        self.prompt_tokens = len(requests[0].prompt.input_ids)
        self._engine = engine
        self._requests = requests
        self._metrics = metrics
        self._start = start
        self._arrived: asyncio.Queue[tuple[int, Sequence[Token], str | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._handles: list[Handle] = []
        self._cancelled = False

    def submit(self) -> None:
        """Gives the requests to the engine. Called in a thread: it reads the images once more.

        Raises:
            ApiError: the queue of the engine is full, or the engine has ended.
        """
        try:
            for row, request in enumerate(self._requests):
                handle = self._engine.submit(request, self._receiver(row))
                self._handles.append(handle)
                if self._cancelled:  # meanwhile, in the event loop
                    handle.cancel()
        except Full:
            self._refuse()
            seconds = max(1, round(self._metrics.answer_seconds))
            message = "the server is busy; try again later"
            raise ApiError(429, message, code="queue_full", retry_after=seconds) from None
        except Closed:
            self._refuse()
            raise _failure("cancelled") from None
        self._metrics.prompt_tokens.inc(self.prompt_tokens)

    @property
    def new_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields what arrives, until all rows have ended.

        Raises:
            ApiError: the engine could not finish a row.
        """
        unfinished = len(self.rows)
        while unfinished:
            for index, (tokens, reason) in (await self._latest()).items():
                row = self.rows[index]
                if row.finish_reason is not None:  # tokens after a stop string
                    continue
                if reason in ("cancelled", "error"):
                    self._finish(row, reason)
                    raise _failure(reason)
                piece = self._add(index, tokens, reason)
                unfinished -= piece.finish_reason is not None
                if piece.text or piece.tokens or piece.finish_reason:
                    yield piece

    async def finished(self) -> None:
        """Waits until all rows have ended. Raises what `pieces` raises."""
        async for _ in self.pieces():
            pass

    def cancel(self) -> None:
        """Frees the rows that have not ended."""
        self._cancelled = True
        for row, handle in zip(self.rows, list(self._handles), strict=False):
            if row.finish_reason is None:
                handle.cancel()
        for row in self.rows:
            if row.finish_reason is None:
                self._finish(row, "cancelled")

    async def _latest(self) -> dict[int, tuple[list[Token], str | None]]:
        """Returns the tokens and the finish reason that have arrived, by row.

        What has arrived while the event loop was busy is given together, which costs it less.
        """
        latest: dict[int, tuple[list[Token], str | None]] = {}
        arrived = [await self._arrived.get()]
        while not self._arrived.empty():
            arrived.append(self._arrived.get_nowait())
        for index, tokens, reason in arrived:
            earlier, _ = latest.get(index, ([], None))
            latest[index] = ([*earlier, *tokens], reason)
        return latest

    def _receiver(self, index: int) -> Callable[[Sequence[Token], str | None], None]:
        def receive(tokens: Sequence[Token], reason: str | None) -> None:
            """Called by the thread of the engine."""
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, tokens, reason))

        return receive

    def _add(self, index: int, tokens: Sequence[Token], reason: str | None) -> Piece:
        row = self.rows[index]
        self._measure(row, len(tokens))
        row.tokens += tokens
        text = row.text.add([token.id for token in tokens]) if tokens else ""
        if reason is not None:
            text += row.text.end()
        if row.text.stopped:
            reason = "stop"
            self._handles[index].cancel()
        if reason is not None:
            self._finish(row, reason)
        return Piece(row=index, text=text, tokens=tokens, finish_reason=reason)

    def _measure(self, row: Row, count: int) -> None:
        if not count:
            return
        now = time.perf_counter()
        if row.latest is None:
            self._metrics.first_token.observe(now - self._start)
        else:
            self._metrics.between_tokens.observe((now - row.latest) / count)
        row.latest = now

    def _refuse(self) -> None:
        """Frees the rows that have been submitted. None of them counts as an answer."""
        for handle in self._handles:
            handle.cancel()
        for row in self.rows:
            row.finish_reason = "refused"

    def _finish(self, row: Row, reason: str) -> None:
        row.finish_reason = reason
        self._metrics.answered(reason, time.perf_counter() - self._start, len(row.tokens))


def _failure(reason: str) -> ApiError:
    if reason == "cancelled":
        return shutting_down()
    message = "the answer failed; the log of the server says why"
    return ApiError(500, message, code="answer_failed")
