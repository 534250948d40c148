"""What requests pass before vLLM's server reads them: keys for all routes, and limits of bodies."""

from __future__ import annotations

import os

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qwenvl_lit.serving.auth import VARIABLE, Keys, read_keys
from qwenvl_lit.serving.errors import ApiError
from qwenvl_lit.serving.gate import check_key, read_body, refuse, replay
from qwenvl_lit.serving.vllm.launch import BODY_SECONDS, MAX_BODY

DEFAULT_BYTES, DEFAULT_SECONDS = 32_000_000, 30.0
OPEN = ("/health", "/ping", "/metrics", "/version", "/load")  # routes that need no key
WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


class RequestGate:
    """ASGI middleware that `vllm serve` creates by its name, from `--middleware`.

    vLLM itself asks for a key only below /v1 and a few other addresses: /invocations answers
    everybody. It reads bodies of any size. The settings come from the environment, see `launch`.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        file = os.environ.get(VARIABLE)
        self.keys = Keys(read_keys(file) if file else ())
        self.most = int(os.environ.get(MAX_BODY, DEFAULT_BYTES))
        self.seconds = float(os.environ.get(BODY_SECONDS, DEFAULT_SECONDS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        method = scope.get("method")  # none of a WebSocket
        try:
            if scope["path"] not in OPEN and method != "OPTIONS":  # which browsers send without key
                check_key(self.keys, headers)
            if method is not None and method not in WITHOUT_BODY:
                body = await read_body(headers, receive, most=self.most, seconds=self.seconds)
                receive = replay(body, receive)
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": error.message})
            else:
                await refuse(error, receive, send)
            return
        await self.app(scope, receive, send)
