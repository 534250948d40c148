"""Requests for continuous batching, and what their senders get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qwenvl_lit.bounds import check_number
from qwenvl_lit.generation.sampling import Sampling
from qwenvl_lit.types import Sample

FinishReason = Literal["stop", "length", "cancelled", "error"]
OnTokens = Callable[[Sequence["Token"], FinishReason | None], None]


class Full(RuntimeError):  # noqa: N818 - a state, not a fault
    """The queue is full: try again later."""


class Closed(RuntimeError):  # noqa: N818 - a state, not a fault
    """No further requests are accepted: the batch is draining, closed, or has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt and how it is to be answered; greedy unless there is a temperature.

    Args:
        prompt: from `Processor.encode` with `prompt=True`.
        max_new_tokens: fewer are generated if the slots of a row end before.
        seed: of this row; None: torch's default generator.
        logprobs: the number of alternatives to each token to report; 0: only the logprob of the
            token itself; None: no logprobs.

    Raises:
        ValueError: a value is out of range.
    """

    prompt: Sample
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self):
        check_number("max_new_tokens", self.max_new_tokens, least=1, whole=True)
        bounds = {"least": -(2**63), "most": 2**63 - 1, "whole": True, "optional": True}
        check_number("seed", self.seed, **bounds)
        check_number("logprobs", self.logprobs, least=0, most=20, whole=True, optional=True)
        _ = self.sampling  # checks the other values

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. Its logprobs are those of the model, before penalty and temperature."""

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()  # the likeliest tokens and their logprobs, in order


class Handle:
    """A request that was accepted."""

    def __init__(
        self,
        request: Request,
        on_tokens: OnTokens,
        *,
        image_keys: Sequence[str],
        most: int,
        cancel: Callable[[Handle], None],
    ):
        self.request = request
        self.on_tokens = on_tokens
        self.error: BaseException | None = None  # why the finish reason is "error"
        self._cancel = cancel

        # The rest belongs to the thread that answers.
        self.image_keys = image_keys
        self.most = most  # new tokens
        self.row: int | None = None
        self.queued = 0  # tokens that are computed, or will be once the queued steps have run
        self.delivered = 0
        self.finished = False

    def cancel(self) -> None:
        """Ends the answer, with the finish reason "cancelled" unless it has ended. Thread-safe."""
        self._cancel(self)
