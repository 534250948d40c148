"""Continuous batching: requests join and leave a running batch, each answered as if alone.

One thread owns the model and its decoder. Between two steps it reads a limited number of prompt
tokens, so that running answers are not held up for long.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwenvl_lit.bounds import check_number
from qwenvl_lit.generation.request import Closed, Full, Handle, OnTokens, Request
from qwenvl_lit.generation.running_batch import RunningBatch
from qwenvl_lit.types import DataError, Sample

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family, Processor
    from qwenvl_lit.types import Batch

# On a GPU, batches of prompts should have widths that are multiples of this number. Compiled
# kernels are specialized for such widths; other widths would take another compilation.
WIDTH_MULTIPLE = 16

log = logging.getLogger(__name__)


class ContinuousBatching:
    """Answers requests with one model, as they come.

    >>> with ContinuousBatching(model, family, processor, ...) as batching:     # doctest: +SKIP
    ...     sample = processor.encode(conversation, prompt=True)
    ...     request = Request(prompt=sample, max_new_tokens=64)
    ...     handle = batching.submit(request, lambda tokens, finish_reason: ...)

    Args:
        collate: makes a left-padded batch of prompts, such as `data.collate.Pad` with
            `multiple_of=WIDTH_MULTIPLE`.
        rows: the most requests that are answered at a time.
        slots: the most tokens of a request, its prompt and its answer together. The cache has
            memory for `rows * slots` tokens.
        max_waiting: the most requests that wait for a row.
        prompt_tokens: about how many prompt tokens are read between two steps, where encoding an
            image counts as many as the image has. With more, requests begin earlier and hold up
            running ones for longer.
        compiled: whether to compile the decoder; None: on a GPU.

    Raises:
        ValueError: a value is out of range; or the network is spread over devices, or has no
            decoder of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        processor: Processor,
        *,
        collate: Callable[[Sequence[Sample]], Batch],
        rows: int,
        slots: int,
        max_waiting: int = 256,
        prompt_tokens: int = 2048,
        compiled: bool | None = None,
    ):
        check_number("rows", rows, least=1, whole=True)
        check_number("slots", slots, least=2, whole=True)
        check_number("max_waiting", max_waiting, least=1, whole=True)
        check_number("prompt_tokens", prompt_tokens, least=1, whole=True)
        self.max_waiting = max_waiting
        self._batch = RunningBatch(
            model,
            family,
            processor,
            collate=collate,
            rows=rows,
            slots=slots,
            prompt_tokens=prompt_tokens,
            compiled=compiled,
        )
        self.ready = threading.Event()
        """Set once requests are answered without delay, after warm-up."""
        self.failure: BaseException | None = None
        """Why the thread has ended, if not by `close`."""
        self._thread = threading.Thread(target=self._work, name="continuous-batching", daemon=True)

        # The state below is shared by threads, under this lock.
        self._changed = threading.Condition()
        self._queue: deque[Handle] = deque()
        self._cancelled: list[Handle] = []
        self._accepting = True
        self._closing = False
        self._idle = True

    def __enter__(self) -> ContinuousBatching:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> None:
        """Starts the thread, which first warms up. Requests may be submitted before and after."""
        self._thread.start()

    def submit(self, request: Request, on_tokens: OnTokens) -> Handle:
        """Queues a request. Reads image files, to recognize equal images.

        Args:
            on_tokens: called from the thread with new tokens, without stop token, and the finish
                reason if these are the last. It must not block. If it raises, the answer ends.

        Raises:
            DataError: the prompt is empty, or too long.
            Full: as many requests wait as may.
            Closed: no requests are accepted anymore.
        """
        tokens, slots = len(request.prompt.input_ids), self._batch.slots
        if not tokens:
            raise DataError("there is nothing to answer: the prompt is empty")
        if tokens >= slots:
            raise DataError(
                f"the prompt has {tokens} tokens, and with its answer it may have {slots}; "
                f"shorten it, or give fewer images"
            )
        handle = Handle(
            request,
            on_tokens,
            image_keys=[image.key for image in request.prompt.images],
            most=min(request.max_new_tokens, slots - tokens),
            cancel=self._cancel,
        )
        with self._changed:
            if not self._accepting:
                raise Closed("no further requests are accepted")
            if len(self._queue) >= self.max_waiting:
                raise Full(f"{len(self._queue)} requests wait already")
            self._queue.append(handle)
            self._idle = False
            self._changed.notify_all()
        return handle

    @property
    def waiting(self) -> int:
        """The number of requests without a row."""
        return len(self._queue) + self._batch.beginning

    @property
    def running(self) -> int:
        """The number of requests with a row."""
        return self._batch.running

    def drain(self, seconds: float) -> bool:
        """Accepts no further requests, and waits until all others have ended.

        Returns:
            Whether they have ended within `seconds`.
        """
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: self._idle, timeout=seconds)

    def close(self) -> None:
        """Cancels all requests and ends the thread."""
        with self._changed:
            self._accepting = False
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is None:  # it was never started
            self._end_all()
        else:
            self._thread.join()

    def _cancel(self, handle: Handle) -> None:
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify_all()

    # -- the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            if self._batch.device.type == "cuda":
                torch.cuda.set_device(self._batch.device)
                self._batch.warm_up()
            self.ready.set()
            while self._wait_for_work():
                self._batch.turn()
        except BaseException as error:
            # For example, an error of the GPU. Those who wait for answers must hear of it.
            log.exception("answering has failed; no further requests are accepted")
            self.failure = error
        self._end_all()

    def _wait_for_work(self) -> bool:
        """Blocks while there is nothing to do. Returns False if the thread must end.

        Gives the batch what it has to begin and to cancel.
        """
        with self._changed:
            while not (self._closing or self._queue or self._cancelled or self._batch.has_work):
                self._idle = True
                self._changed.notify_all()
                self._changed.wait()
            cancelled, self._cancelled = self._cancelled, []
            for handle in cancelled:
                if handle in self._queue:
                    self._queue.remove(handle)
            self._batch.take(self._queue)
            closing = self._closing
        for handle in cancelled:
            self._batch.cancel(handle)
        return not closing

    def _end_all(self) -> None:
        reason = "error" if self.failure else "cancelled"
        with self._changed:
            self._accepting = False
            handles = list(self._queue)
            self._queue.clear()
        self._batch.end_all(handles, reason, self.failure)
        with self._changed:
            self._idle = True
            self._changed.notify_all()
