"""Answers requests: threads read images and texts, and the engine gets the prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from qwenvl_lit.generation.continuous import ContinuousBatching
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.generation.request import Request
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.serving.answers import Answers
from qwenvl_lit.serving.completions import Completion
from qwenvl_lit.serving.conversations import conversation_of, grounding_of, refused
from qwenvl_lit.serving.errors import ApiError
from qwenvl_lit.serving.images import ImageLoader
from qwenvl_lit.serving.metrics import Metrics
from qwenvl_lit.serving.schema import ChatRequest, Decoding, GroundRequest
from qwenvl_lit.serving.settings import ServeSettings
from qwenvl_lit.serving.text import AnswerText
from qwenvl_lit.types import Conversation, DataError, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a server needs to know of its model, beside the engine.

    Args:
        name: what clients call it.
        generation: the defaults of requests.
        markup_in_answers: markup in earlier answers is read.
    """

    name: str
    processor: Processor
    generation: Generation
    markup_in_answers: bool


class Service:
    """Answers the requests of a server's clients."""

    def __init__(
        self,
        engine: ContinuousBatching,
        model: Model,
        settings: ServeSettings,
        loader: ImageLoader,
    ):
        self.engine = engine
        self.model = model
        self.settings = settings
        self.loader = loader
        self.metrics = Metrics(running=lambda: engine.running, waiting=lambda: engine.waiting)
        self._threads = anyio.CapacityLimiter(settings.workers)

    async def complete(self, body: ChatRequest) -> Completion:
        """Starts the answers to a chat request.

        Raises:
            ApiError: the request cannot be answered.
        """
        start = time.perf_counter()
        self._check_model(body.model)
        choices = body.n or 1
        if choices > self.settings.max_choices:
            message = f"n is at most {self.settings.max_choices}, got {choices}"
            raise ApiError(400, message, param="n", code="invalid_value")
        read = partial(
            conversation_of,
            body.messages,
            self.loader.load,
            max_images=self.settings.max_images,
            one_text=self.model.processor.continues_text,
            markup_in_answers=self.model.markup_in_answers,
        )
        sample = await self._in_thread(self._sample, read, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = self._requests(sample, body, body.most_tokens, choices, logprobs)
        options = body.stream_options
        return Completion(
            model=self.model.name,
            conversation=sample.conversation,
            processor=self.model.processor,
            answers=await self._answers(requests, body.stop or (), start),
            logprobs=bool(body.logprobs),
            include_usage=bool(options and options.include_usage),
        )

    async def ground(self, body: GroundRequest) -> Completion:
        """Starts the answer to the question where something is in an image.

        Raises:
            ApiError: the request cannot be answered.
        """
        start = time.perf_counter()
        self._check_model(body.model)
        read = partial(
            grounding_of,
            body.image,
            body.label,
            self.loader.load,
            prompt=self.model.processor.find_prompt,
        )
        sample = await self._in_thread(self._sample, read, "image")
        requests = self._requests(sample, Decoding(), body.max_tokens, 1, None)
        return Completion(
            model=self.model.name,
            conversation=sample.conversation,
            processor=self.model.processor,
            answers=await self._answers(requests, (), start),
            logprobs=False,
            include_usage=True,
        )

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # A thread that is abandoned, because the client has left, ends within its limits.
        return await anyio.to_thread.run_sync(
            function, *arguments, limiter=self._threads, abandon_on_cancel=True
        )

    def _sample(self, read: Callable[[], Conversation], param: str) -> Sample:
        try:
            return self.model.processor.encode(read(), prompt=True)
        except DataError as error:
            raise refused(error, param, code="invalid_value") from None

    def _requests(
        self,
        sample: Sample,
        decoding: Decoding,
        most_tokens: int | None,
        choices: int,
        logprobs: int | None,
    ) -> list[Request]:
        defaults = self.model.generation
        left = self.settings.context - len(sample.input_ids)
        if left < 1:
            raise ApiError(
                400,
                f"the prompt has {len(sample.input_ids)} tokens, and prompt and answer together "
                f"have at most {self.settings.context}; shorten it, or send fewer images",
                param="messages",
                code="context_length_exceeded",
            )
        greedy_unless = defaults.temperature if defaults.do_sample else 0.0
        seed = _given(decoding.seed, defaults.seed)
        requests = []
        for choice in range(choices):
            requests.append(
                Request(
                    prompt=sample,
                    max_new_tokens=min(most_tokens or defaults.max_new_tokens, left),
                    temperature=_given(decoding.temperature, greedy_unless),
                    top_p=_given(decoding.top_p, defaults.top_p),
                    top_k=_given(decoding.top_k, defaults.top_k),
                    repetition_penalty=_given(
                        decoding.repetition_penalty, defaults.repetition_penalty
                    ),
                    # Choices with one seed would be equal.
                    seed=None if seed is None else (seed + choice) % 2**63,
                    logprobs=logprobs,
                )
            )
        return requests

    async def _answers(
        self, requests: Sequence[Request], stops: Sequence[str], start: float
    ) -> Answers:
        answers = Answers(
            self.engine,
            requests,
            make_text=lambda: AnswerText(self._decode, stops),
            metrics=self.metrics,
            start=start,
        )
        try:
            await self._in_thread(answers.submit)
        except BaseException:
            answers.cancel()
            raise
        return answers

    def _decode(self, ids: Sequence[int]) -> str:
        return "".join(self.model.processor.stream(ids))

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model.name):
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; this server has {self.model.name!r}",
                param="model",
                code="model_not_found",
            )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
