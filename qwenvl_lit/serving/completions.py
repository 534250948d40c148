"""Bodies of chat completions in the format of OpenAI's API, whole and as chunks of a stream.

A message has the further field `objects`: the labels and boxes of the answer, in pixels.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl_lit.callbacks.predictions import object_rows
from qwenvl_lit.generation.request import Token
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.serving.answers import Answers, Piece
from qwenvl_lit.serving.errors import ApiError
from qwenvl_lit.types import Conversation

LEAST_LOGPROB = -9999.0  # as OpenAI writes what would be minus infinity, which JSON has not
LAST_EVENT = "data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """Writes the answers to one request.

    Args:
        logprobs: write the log-probabilities of the tokens.
        include_usage: end a stream with the numbers of tokens.
    """

    model: str
    conversation: Conversation
    processor: Processor
    answers: Answers
    logprobs: bool
    include_usage: bool

    @property
    def usage(self) -> dict[str, int]:
        prompt, new = self.answers.prompt_tokens, self.answers.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def objects(self, text: str) -> list[dict[str, Any]]:
        """Returns the objects of an answer as plain data."""
        return object_rows(self.processor.read(text, self.conversation))

    def whole(self) -> dict[str, Any]:
        """Returns the body after all answers have ended."""
        choices = []
        for index, row in enumerate(self.answers.rows):
            text = row.text.text
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": {**message, "objects": self.objects(text)},
                    "logprobs": self._logprobs(row.tokens),
                    "finish_reason": row.finish_reason,
                }
            )
        return {**_head("chat.completion", self.model), "choices": choices, "usage": self.usage}

    def grounding(self, label: str) -> dict[str, Any]:
        """Returns the body of the answer where `label` is in an image."""
        [row] = self.answers.rows
        found = []
        for each in self.objects(row.text.text):
            if each["boxes"]:
                found.append({**each, "label": each["label"] or label})
        body = {"object": "grounding", "model": self.model, "objects": found}
        return {**body, "text": row.text.text, "usage": self.usage}

    async def events(self) -> AsyncIterator[str]:
        """Yields the server-sent events of a stream. After an error no answer follows."""
        head = _head("chat.completion.chunk", self.model)
        if self.include_usage:
            head["usage"] = None
        for index in range(len(self.answers.rows)):
            yield _event(
                {**head, "choices": [_choice(index, {"role": "assistant", "content": ""})]}
            )
        try:
            async for piece in self.answers.pieces():
                for choice in self._choices(piece):
                    yield _event({**head, "choices": [choice]})
        except ApiError as error:
            yield _event(error.body)
            return
        if self.include_usage:
            yield _event({**head, "choices": [], "usage": self.usage})
        yield LAST_EVENT

    def _choices(self, piece: Piece) -> list[dict[str, Any]]:
        choices = []
        if piece.text or (self.logprobs and piece.tokens):
            logprobs = self._logprobs(piece.tokens)
            choices.append(_choice(piece.row, {"content": piece.text}, logprobs=logprobs))
        if piece.finish_reason:
            delta = {"objects": self.objects(self.answers.rows[piece.row].text.text)}
            choices.append(_choice(piece.row, delta, finish_reason=piece.finish_reason))
        return choices

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for token in tokens:
            entry = _entry(token.id, token.logprob, self.processor.text)
            top = [_entry(each, logprob, self.processor.text) for each, logprob in token.top]
            content.append({**entry, "top_logprobs": top})
        return {"content": content, "refusal": None}


def _head(kind: str, model: str) -> dict[str, Any]:
    identifier = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": model}


def _choice(
    index: int,
    delta: Mapping[str, Any],
    *,
    logprobs: Mapping[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _entry(
    token_id: int, logprob: float | None, show: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    text = show([token_id])
    # A token may be a part of a character; its bytes are not known then.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob or 0.0, LEAST_LOGPROB), "bytes": known}


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
