"""The requests that the server reads. Unknown fields are errors, never ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_MESSAGES = 2048
MAX_STOPS = 4  # as in OpenAI's API
MAX_STOP_CHARACTERS = 256
MAX_LABEL_CHARACTERS = 2000

# Fields of OpenAI's API that are not supported, with the values that ask for nothing.
UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# Fields of an answer that clients send back. Here they are null, or follow from the text.
OF_ANSWERS = ("annotations", "audio", "function_call", "refusal", "tool_calls")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str  # a data URI, or an http or https address
    detail: Literal["auto", "high"] | None = None  # images are never reduced, as "low" asks


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[list[Part], BeforeValidator(_as_parts)]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        kept = {}
        for name, value in message.items():
            # `objects` was read from the text.
            if name != "objects" and not (name in OF_ANSWERS and not value):
                kept[name] = value
        return kept


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    include_usage: bool | None = None


def _as_stops(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Decoding(Strict):
    """How tokens are chosen. None stands for the default of the server."""

    temperature: float | None = Field(None, ge=0, le=2)  # 0: greedy
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=10**6)  # 0: no limit
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    max_tokens: int | None = Field(None, ge=1, le=10**6)


class ChatRequest(Decoding):
    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    stop: Annotated[list[Stop] | None, BeforeValidator(_as_stops)] = Field(
        None, max_length=MAX_STOPS
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=10**6)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # Identifies a client's user. It changes nothing, in OpenAI's API neither.
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, request: Any) -> Any:
        """Drops unsupported fields whose value asks for nothing."""
        if not isinstance(request, dict):
            return request
        kept = {}
        for name, value in request.items():
            neutral = name in UNSUPPORTED and (value is None or value in UNSUPPORTED[name])
            if not neutral:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class GroundRequest(Strict):
    model: str | None = None
    image: str  # a data URI, or an http or https address
    label: str = Field(max_length=MAX_LABEL_CHARACTERS)
    max_tokens: int | None = Field(None, ge=1, le=10**6)
