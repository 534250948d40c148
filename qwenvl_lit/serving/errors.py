"""Errors of the server, with bodies in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {429: "rate_limit_error"}  # of OpenAI's errors, by status
RESTART_SECONDS = 10  # until a server that shuts down is likely back, or another one took over
SHOWN = 40  # characters of a wrong value in a message
# What pydantic's errors about types expect
EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
}
TEXT_OR_LIST = ("content", "stop")  # fields
# What its errors about bounds expect, before the bound
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line that says what is wrong and what to do.
        code: a word for programs.
        param: the field of the request that is wrong.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def shutting_down() -> ApiError:
    message = "the server is shutting down; try again when it has been restarted"
    return ApiError(503, message, code="shutting_down", retry_after=RESTART_SECONDS)


def refused_field(errors: Sequence[Mapping[str, Any]], unsupported: Mapping[str, Any]) -> ApiError:
    """Returns the error for a request body that pydantic has refused.

    Args:
        errors: those of pydantic.
        unsupported: names of fields that OpenAI's API has and this server has not.
    """
    error = errors[0]
    param = _param(error["loc"])
    name = str(error["loc"][-1])
    match error["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is not JSON: {error['ctx']['error']}", code="bad_json")
        case "missing" if not param:
            return ApiError(400, "the body is empty; send JSON", code="bad_json")
        case "missing":
            return ApiError(400, f"{param} is missing", param=param, code="missing_field")
        case "model_attributes_type" | "dict_type" if not param:
            message = "the body must be a JSON object, sent with Content-Type: application/json"
            return ApiError(400, message, code="bad_json")
        case "model_attributes_type" | "dict_type":
            example = ', {"url": "data:image/png;base64,..."}' if name == "image_url" else ""
            message = f"{param} must be a JSON object{example}"
            return ApiError(400, message, param=param, code="invalid_value")
        case "extra_forbidden" if name in unsupported and param == name:
            message = f"{name} is not supported by this server; leave it out"
            return ApiError(400, message, param=param, code="unsupported_field")
        case "extra_forbidden":
            message = f"{param} is no field that this server knows; leave it out"
            return ApiError(400, message, param=param, code="unknown_field")
        case "union_tag_not_found":
            param = f"{param}.{_discriminator(error)}"
            return ApiError(400, f"{param} is missing", param=param, code="missing_field")
        case "union_tag_invalid":
            param = f"{param}.{_discriminator(error)}"
    return ApiError(400, _wrong_value(error, param), param=param, code="invalid_value")


def _wrong_value(error: Mapping[str, Any], param: str | None) -> str:
    """Returns what a field must be, and what it is."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    match kind:
        case "union_tag_invalid":
            tags = _alternatives(context["expected_tags"].replace("'", "").split(", "))
            return f"{param} must be {tags}, got {context['tag'][:SHOWN]!r}"
        case "literal_error":
            choices = context["expected"].replace("'", "")
            return f"{param} must be {choices}, got {_shown(value)}"
        case "too_short":
            return f"{param} is empty"
        case "too_long":
            return f"{param} has at most {context['max_length']} entries, got {len(value)}"
        case "string_too_short":
            return f"{param} is empty"
        case "string_too_long":
            return f"{param} has at most {context['max_length']} characters, got {len(value)}"
    if kind in EXPECTED:
        text_or = "text or " if error["loc"][-1] in TEXT_OR_LIST else ""
        return f"{param} must be {text_or}{EXPECTED[kind]}, got {_shown(value)}"
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"{param} must be {words} {context[bound]:.20g}, got {_shown(value)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{param}: {message}" if param else message


def _discriminator(error: Mapping[str, Any]) -> str:
    return error["ctx"]["discriminator"].strip("'")


def _alternatives(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _shown(value: Any) -> str:
    """Returns a value of JSON for a message."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"{value!r:.{SHOWN}}"


def _param(location: Sequence[str | int]) -> str | None:
    """Returns the name of a field, such as `messages[0].content[1].image_url.url`.

    After the index of a message or a content part, pydantic's location has its role or type, which
    is no field.
    """
    param, after_index = "", False
    for step in location[1:]:  # the first one is "body"
        if isinstance(step, int):
            param += f"[{step}]"
        elif not after_index:
            param += f".{step}"
        after_index = isinstance(step, int)
    return param.removeprefix(".") or None
