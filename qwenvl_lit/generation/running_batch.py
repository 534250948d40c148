"""The rows of continuous batching: prompts that are read, steps, and the tokens they yield."""

# n rows of a step, V vocabulary size, L alternatives to a token

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from qwenvl_lit.generation.decoders import decoder_of
from qwenvl_lit.generation.request import FinishReason, Handle, Token
from qwenvl_lit.generation.sampling import NextToken, finite_sums
from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.types import QUESTION_ID, Conversation, DataError, ImageSource, Sample, Turn

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family, Processor, Prompts
    from qwenvl_lit.types import Batch

NOT_FINITE = (
    "the logits of this answer are not finite (NaN or infinite): the weights are damaged, or "
    "activations overflow; with model.dtype=float16 try bfloat16 or float32"
)

WARM_UP_PROMPTS = (1, 2, 3, 4)  # numbers of prompts, and of images, that are read together

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Reading:
    """Requests whose prompts are being read together; `prompts` is None until this has begun."""

    handles: Sequence[Handle]
    prompts: Prompts | None = None


@dataclass(slots=True)
class _Chosen:
    """Tokens that were chosen but may not have arrived from the device."""

    handles: Sequence[Handle | None]  # of each row
    ids: HostCopy
    finite: HostCopy
    logprobs: HostCopy | None = None  # (n,) of the ids
    top_ids: HostCopy | None = None  # (n, L)
    top_logprobs: HostCopy | None = None


class RunningBatch:
    """Requests that are being answered together, by one thread.

    `turn` queues a step before it reads the ids of the step before, so that a GPU never waits for
    the host. A row that ends with a stop token therefore runs one step too many.

    The arguments are those of `ContinuousBatching`.
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
        prompt_tokens: int,
        compiled: bool | None,
    ):
        decoder = decoder_of(model)
        if decoder is None:
            raise ValueError(
                "continuous batching needs a network on a single device, with a decoder of its own"
            )
        self.model = model  # the decoder does not keep it alive
        self.family = family
        self.processor = processor
        self.collate = collate
        self.slots = slots
        self.prompt_tokens = prompt_tokens
        self.device = decoder.device
        on_gpu = self.device.type == "cuda"
        self.steps_ahead = int(on_gpu)  # steps that are queued while earlier ids are read
        compiled = on_gpu if compiled is None else compiled
        with torch.inference_mode():
            self.running_rows = decoder.running_rows(rows=rows, slots=slots, compiled=compiled)
        self.next_token: NextToken | None = None
        self.rows: list[Handle | None] = [None] * rows
        self.reading: _Reading | None = None
        self.alone: deque[Handle] = deque()  # to be read alone, after an error together
        self.chosen: deque[_Chosen] = deque()

    @property
    def running(self) -> int:
        """The number of requests with a row."""
        return len(self.rows) - self.rows.count(None)

    @property
    def beginning(self) -> int:
        """The number of requests whose prompts are being read."""
        reading = self.reading
        return len(self.alone) + (len(reading.handles) if reading else 0)

    @property
    def has_work(self) -> bool:
        return bool(self.reading or self.alone or self.chosen or self.running)

    @torch.inference_mode()
    def turn(self) -> None:
        """Reads a piece of prompts, makes a step if there are rows, and passes tokens on."""
        self._read_prompts()
        stepped = self._step()
        self._deliver(leave=self.steps_ahead if stepped else 0)

    def cancel(self, handle: Handle) -> None:
        """Ends a request that is not in the queue anymore."""
        if handle in self.alone:
            self.alone.remove(handle)
        self.finish(handle, "cancelled")
        if self.reading is not None and all(other.finished for other in self.reading.handles):
            self.reading = None

    def end_all(
        self, queue: Sequence[Handle], reason: FinishReason, error: BaseException | None
    ) -> None:
        """Ends all requests, those of a queue included."""
        handles = [*self.alone, *queue, *(handle for handle in self.rows if handle is not None)]
        if self.reading is not None:
            handles += self.reading.handles
        for chosen in self.chosen:
            handles += [handle for handle in chosen.handles if handle is not None]
        for handle in handles:
            handle.error = handle.error or error
            self.finish(handle, reason)
        self.reading = None
        self.alone.clear()
        self.chosen.clear()

    # -- prompts -----------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Reads a piece of the prompts. Their rows join after the last piece."""
        reading = self.reading
        if reading is None:
            return
        try:
            if reading.prompts is None:
                image_keys: list[str] = []
                for handle in reading.handles:
                    image_keys += handle.image_keys
                samples = [handle.request.prompt for handle in reading.handles]
                reading.prompts = self._prompts(samples, image_keys)
            done = reading.prompts.advance(self.prompt_tokens)
        except Exception as error:  # of a model that others, whose rows go on, run too
            self.reading = None
            if len(reading.handles) > 1:
                self.alone += [handle for handle in reading.handles if not handle.finished]
            else:
                self._fail(reading.handles[0], error)
            return
        if done:
            self.reading = None
            self._join(reading)

    def take(self, queue: deque[Handle]) -> None:
        """Takes requests whose prompts are read together, in order, if none are being read.

        There is a free row for each. Together they have about `prompt_tokens` tokens.
        """
        free = self.rows.count(None)
        if self.reading is not None or not free:
            return
        if self.alone:
            self.reading = _Reading([self.alone.popleft()])
            return
        handles: list[Handle] = []
        longest = images = 0
        while queue and len(handles) < free:
            prompt = queue[0].request.prompt
            longest = max(longest, len(prompt.input_ids))
            images += len(prompt.vision_positions)  # encoding a token of an image counts too
            if handles and (len(handles) + 1) * longest + images > self.prompt_tokens:
                break
            handles.append(queue.popleft())
        if handles:
            self.reading = _Reading(handles)

    def _prompts(self, samples: Sequence[Sample], image_keys: Sequence[str]) -> Prompts:
        batch = self.collate(samples)
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # a copy from other memory would synchronize
        inputs = self.family.inputs(batch.to(self.device), generate=True)
        return self.running_rows.read(inputs, lengths=batch.lengths, image_keys=image_keys)

    def _join(self, reading: _Reading) -> None:
        """Chooses the first tokens and gives each request a row."""
        prompts = reading.prompts
        assert prompts is not None
        assert prompts.logits is not None
        free = [row for row, handle in enumerate(self.rows) if handle is None]
        handles, rows, logits, joining = [], [], [], {}
        if self.next_token is None:
            vocabulary = prompts.logits.shape[1]
            self.next_token = NextToken(len(self.rows), vocabulary, self.device)
        for index, handle in enumerate(reading.handles):
            if handle.finished:
                continue
            row = free[len(rows)]
            request, padding = handle.request, prompts.length - prompts.lengths[index]
            ids = prompts.inputs["input_ids"][index, padding:]
            self.next_token.begin(row, request.sampling, ids, seed=request.seed)
            handles.append(handle)
            rows.append(row)
            logits.append(prompts.logits[index])
            joining[index] = row
        ids = self._choose(torch.stack(logits), handles, rows)
        self.running_rows.join(prompts, joining, ids)
        for handle, row in zip(handles, rows, strict=True):
            self.rows[row], handle.row = handle, row
            if handle.queued == handle.most:
                self._leave(handle)

    # -- steps -------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Queues a step of all rows, if there are any."""
        if not self.running:
            return False
        logits = self.running_rows.step()
        count = len(logits)
        handles = self.rows[:count]
        self.running_rows.latest[:count] = self._choose(logits, handles, range(count))
        for handle in handles:
            if handle is not None and handle.queued == handle.most:
                self._leave(handle)
        return True

    def _choose(
        self, logits: torch.Tensor, handles: Sequence[Handle | None], rows: Sequence[int]
    ) -> torch.Tensor:
        """Chooses the next id of each row, and queues what is reported of it."""
        assert self.next_token is not None
        ids = self.next_token(logits, rows)
        chosen = _Chosen(handles, HostCopy(ids), HostCopy(finite_sums(logits).isfinite()))
        most = None
        for handle in handles:
            if handle is not None:
                handle.queued += 1
                if handle.request.logprobs is not None:
                    most = max(most or 0, handle.request.logprobs)
        if most is not None:
            logprobs = logits.float().log_softmax(-1)
            chosen.logprobs = HostCopy(logprobs.gather(1, ids[:, None])[:, 0])
            top = logprobs.topk(min(most, logits.shape[1]))
            chosen.top_ids, chosen.top_logprobs = HostCopy(top.indices), HostCopy(top.values)
        self.chosen.append(chosen)
        return ids

    def _deliver(self, *, leave: int) -> None:
        """Reads chosen tokens and passes them on, except for those of the last steps."""
        while len(self.chosen) > leave:
            chosen = self.chosen.popleft()
            ids, finite = chosen.ids.read().tolist(), chosen.finite.read().tolist()
            for index, handle in enumerate(chosen.handles):
                if handle is None or handle.finished:
                    continue
                if not finite[index]:
                    self._fail(handle, DataError(NOT_FINITE))
                elif ids[index] in self.processor.stop_ids:
                    self.finish(handle, "stop")
                else:
                    self._give(handle, _token(chosen, index, ids[index], handle.request.logprobs))

    def _give(self, handle: Handle, token: Token) -> None:
        handle.delivered += 1
        if handle.delivered == handle.most:
            self.finish(handle, "length", [token])
        else:
            self._call(handle, [token], None)

    # -- ends --------------------------------------------------------------------------------------

    def _fail(self, handle: Handle, error: Exception) -> None:
        handle.error = error
        self.finish(handle, "error")

    def finish(self, handle: Handle, reason: FinishReason, tokens: Sequence[Token] = ()) -> None:
        if not handle.finished:
            handle.finished = True
            self._leave(handle)
            self._call(handle, tokens, reason)

    def _leave(self, handle: Handle) -> None:
        """Frees the row of a request, whose last tokens may still have to be delivered."""
        if handle.row is not None:
            self.running_rows.leave(handle.row)
            self.rows[handle.row] = handle.row = None

    def _call(self, handle: Handle, tokens: Sequence[Token], reason: FinishReason | None) -> None:
        try:
            handle.on_tokens(tokens, reason)
        except Exception as error:  # of a caller, which must not end the answers to others
            log.exception("a function that receives tokens has failed; its answer ends")
            handle.error = error
            handle.finished = True
            self._leave(handle)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles and captures what requests will need, with prompts of one image each."""
        samples = []
        for shade in range(WARM_UP_PROMPTS[-1]):
            parts = (ImageSource(Image.new("L", (448, 448), shade)), "Where?")
            question = Conversation(id=QUESTION_ID, turns=(Turn(role="user", parts=parts),))
            samples.append(self.processor.encode(question, prompt=True))
        if len(samples[0].input_ids) < self.slots:
            for count in WARM_UP_PROMPTS:
                # Other images each time: those with known keys are not encoded again.
                image_keys = [f"warm-up {count} {index}" for index in range(count)]
                prompts = self._prompts(samples[:count], image_keys)
                while not prompts.advance(self.prompt_tokens):
                    pass
        self.running_rows.warm_up()


def _token(chosen: _Chosen, index: int, token_id: int, logprobs: int | None) -> Token:
    if logprobs is None:
        return Token(token_id)
    assert chosen.logprobs is not None
    assert chosen.top_ids is not None
    assert chosen.top_logprobs is not None
    ids = chosen.top_ids.read()[index, :logprobs].tolist()
    values = chosen.top_logprobs.read()[index, :logprobs].tolist()
    top = tuple(zip(ids, values, strict=True))
    return Token(token_id, chosen.logprobs.read()[index].item(), top)
