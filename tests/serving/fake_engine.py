"""An engine for tests of the server, with given answers, pace and queue."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from qwenvl_lit.generation.request import Full, Request, Token


class Handle:
    def __init__(self, request: Request, ids: Sequence[int], on_tokens: Callable):
        self.request, self.ids, self.on_tokens = request, list(ids), on_tokens
        self.sent = 0
        self.cancelled_at: float | None = None  # on the clock `time.perf_counter`
        self.freed_at: float | None = None

    def cancel(self) -> None:
        self.cancelled_at = self.cancelled_at or time.perf_counter()


class FakeEngine:
    """Sends each request its answer, one id of each row per step.

    Args:
        answer: the ids of the answer to a request, without an end-of-turn token.
        rows: answers at a time.
        queue: requests that can wait.
        step: seconds.
        fails: rows end with this reason after their first id.
    """

    def __init__(
        self,
        answer: Callable[[Request], Sequence[int]],
        *,
        rows: int = 4,
        queue: int = 64,
        step: float = 0.0,
        fails: str | None = None,
    ):
        self.answer, self.rows, self.queue, self.step, self.fails = answer, rows, queue, step, fails
        self.handles: list[Handle] = []  # of all requests
        self.steps = 0
        self._waiting: deque[Handle] = deque()
        self._running: list[Handle] = []
        self._lock = threading.Condition()
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._ends = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def submit(self, request: Request, on_tokens: Callable) -> Handle:
        with self._lock:
            if len(self._waiting) >= self.queue:
                raise Full
            handle = Handle(request, self.answer(request), on_tokens)
            self.handles.append(handle)
            self._waiting.append(handle)
            self._lock.notify()
        return handle

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self.ready.set()
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._ends = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._waiting or self._running or self._ends):
                    self._lock.wait()
                if self._ends:
                    break
                while self._waiting and len(self._running) < self.rows:
                    self._running.append(self._waiting.popleft())
            self.steps += 1
            self._running = [handle for handle in self._running if self._advance(handle)]
            time.sleep(self.step)
        for handle in (*self._running, *self._waiting):
            handle.on_tokens((), "cancelled")

    def _advance(self, handle: Handle) -> bool:
        """Sends a row its next id; returns whether it goes on."""
        reason = None
        if handle.cancelled_at is not None:
            handle.freed_at = time.perf_counter()
            handle.on_tokens((), "cancelled")
            return False
        ids = handle.ids[: handle.request.max_new_tokens]
        if handle.sent >= len(ids):
            reason = "stop" if len(ids) == len(handle.ids) else "length"
            handle.on_tokens((), reason)
            return False
        token_id = ids[handle.sent]
        handle.sent += 1
        if self.fails and handle.sent > 1:
            handle.on_tokens((), self.fails)
            return False
        top = [(token_id, -0.5), (token_id + 1, float("-inf"))][: handle.request.logprobs or 0]
        logprob = None if handle.request.logprobs is None else -0.5
        handle.on_tokens([Token(token_id, logprob, top)], None)
        return True
