"""Errors of the server, with bodies in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {429: "rate_limit_error"}  # of OpenAI's errors, by status


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
        code: str | None = None,
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
    message = error["msg"].removeprefix("Value error, ")
    place = f"{param}: " if param else ""
    return ApiError(400, f"{place}{message}", param=param, code="invalid_value")


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
