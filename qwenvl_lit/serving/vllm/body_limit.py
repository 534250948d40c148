"""Limits the size of request bodies, which vLLM's server does not do."""

from __future__ import annotations

import os

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenvl_lit.serving.errors import ApiError
from qwenvl_lit.serving.vllm.launch import MAX_BODY

DEFAULT_BYTES = 32_000_000


class BodyLimit:
    """ASGI middleware that refuses larger bodies with status 413, before they are parsed.

    `vllm serve` creates it by its name, from `--middleware`.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.most = int(os.environ.get(MAX_BODY, DEFAULT_BYTES))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        size = int(Headers(scope=scope).get("content-length", 0))
        while size <= self.most:
            message = await receive()
            messages.append(message)
            if not message.get("more_body"):
                break
            size = max(size, sum(len(part.get("body", b"")) for part in messages))
        else:
            text = f"the request has more than {self.most / 1e6:g} MB; send fewer or smaller images"
            error = ApiError(413, text, code="request_too_large")
            response = JSONResponse(error.body, error.status, {"Connection": "close"})
            await response(scope, receive, send)
            return
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)
