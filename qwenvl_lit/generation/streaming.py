"""Yields the tokens of transformers' `generate` while it decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class _Pieces(BaseStreamer):
    """Puts the ids of each step into a queue, which holds one: decoding is one step ahead."""

    def __init__(self, check: Callable[[], object]):
        self.check = check
        self.queue: Queue[list[int] | BaseException | None] = Queue(maxsize=1)
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.check()
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        pass  # `_run` says when `generate` has returned or raised


class _Stop(StoppingCriteria):
    def __init__(self) -> None:
        self.requested = Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(input_ids)
        return torch.full((rows,), self.requested.is_set(), device=input_ids.device)


def stream_ids(generate: Callable[..., object], check: Callable[[], object]) -> Iterator[list[int]]:
    """Yields the new ids of one prompt, one at a time.

    `generate` runs in a thread, at most one step ahead of the caller. The thread has ended when the
    iteration has, even if the caller leaves it early.

    Args:
        generate: calls transformers' `generate` with the arguments `streamer` and
            `stopping_criteria` that it is given.
        check: called after each step; raises an error to end the answer.
    """
    pieces, stop = _Pieces(check), _Stop()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}

    def run() -> None:
        ended: BaseException | None = None
        try:
            # A thread has its own autocast state
            with _autocast("cpu", autocast), _autocast("cuda", autocast):
                generate(streamer=pieces, stopping_criteria=[stop])
        except BaseException as error:  # raised again by the caller's thread
            ended = error
        pieces.queue.put(ended)

    thread = Thread(target=run, name="generate", daemon=True)
    thread.start()
    try:
        while isinstance(piece := pieces.queue.get(), list):
            yield piece
        if piece is not None:
            raise piece
    finally:
        stop.requested.set()
        while thread.is_alive():
            with suppress(Empty):
                pieces.queue.get(timeout=0.01)
            thread.join(timeout=0.01)


def _autocast(kind: str, enabled: dict[str, bool]) -> torch.autocast:
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=enabled[kind])
