"""What a request passes before it is read: key, place in the queue, limits of size and time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenvl_lit.data.download.files import format_bytes
from qwenvl_lit.serving.auth import Keys
from qwenvl_lit.serving.errors import ApiError, shutting_down
from qwenvl_lit.serving.metrics import Metrics
from qwenvl_lit.serving.settings import ServeSettings
from qwenvl_lit.terminal import counted

API = "/v1/"
COUNTED = (
    "/v1/chat/completions",
    "/v1/ground",
    "/v1/models",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/",
)
MOST_SECONDS = 60  # of Retry-After
LINGER_SECONDS = 1.0  # for the rest of a body that is refused
SEND_SECONDS = 30.0  # without a client reading anything of its answer


class Admission:
    """The places for requests that are answered or wait for it. Closed while the server drains."""

    def __init__(self, settings: ServeSettings, metrics: Metrics):
        self._settings = settings
        self.places = settings.rows + settings.queue
        self.taken = 0
        self.is_open = True
        self._metrics = metrics

    @contextmanager
    def place(self) -> Iterator[None]:
        """Takes a place for the block.

        Raises:
            ApiError: all places are taken, or the server is shutting down.
        """
        if not self.is_open:
            raise shutting_down()
        if self.taken >= self.places:
            message = (
                f"the server is busy with {counted(self.taken, 'request')}, as many as it takes "
                f"(serve.rows={self._settings.rows} + serve.queue={self._settings.queue}); try "
                f"again in {self._retry_after} s"
            )
            raise ApiError(429, message, code="queue_full", retry_after=self._retry_after)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    @property
    def _retry_after(self) -> int:
        """The seconds that an answer takes: then there is likely a place."""
        return min(max(1, math.ceil(self._metrics.answer_seconds)), MOST_SECONDS)


class StalledClient(Exception):  # noqa: N818 - not an error of the server
    """A client reads nothing of its response."""


class Gate:
    """ASGI middleware in front of everything else.

    Requests to the API need a key. Those that ask something also need a place, and their bodies are
    read here, before they are parsed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        admission: Admission,
        settings: ServeSettings,
        metrics: Metrics,
    ):
        self.app = app
        self.keys = keys
        self.admission = admission
        self.settings = settings
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._watched(scope, send)
        try:
            await self._pass(scope, receive, send)
        except ApiError as error:
            await refuse(error, receive, send)
        except StalledClient:
            pass  # uvicorn closes the connection of an unfinished response

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["path"].startswith(API):
            check_key(self.keys, headers)
        if scope["method"] != "POST" or not scope["path"].startswith(API):
            await self.app(scope, receive, send)
            return
        with self.admission.place():
            body = await read_body(
                headers,
                receive,
                most=self.settings.max_body_bytes,
                seconds=self.settings.body_s,
            )
            await self.app(scope, replay(body, receive), send)

    def _watched(self, scope: Scope, send: Send) -> Send:
        """Returns `send` that counts the response, and that ends if the client reads nothing."""
        path = scope["path"] if scope["path"] in COUNTED else "other"

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.responses.labels(path, str(message["status"])).inc()
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                raise StalledClient from None

        return watched


async def refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Sends an error, and reads on for a moment without keeping anything.

    A client that is still sending its body would otherwise find its connection reset, and not see
    the error.
    """
    headers = {**error.headers, "Connection": "close"}
    response = JSONResponse(error.body, status_code=error.status, headers=headers)
    start = {"type": "http.response.start", "status": error.status}
    await send({**start, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def read_body(headers: Headers, receive: Receive, *, most: int, seconds: float) -> bytes:
    """Reads the body of a request.

    Args:
        most: bytes of a body.
        seconds: in which it has to arrive.

    Raises:
        ApiError: it is too large, or does not arrive in time.
    """
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    message = "the client has left before its request was complete"
                    raise ApiError(400, message, code="incomplete_body")
                body += message.get("body", b"")
                if len(body) > most:
                    raise _too_large(most)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {seconds:g} s", code="request_timeout"
        ) from None


def check_key(keys: Keys, headers: Headers) -> None:
    """Raises an ApiError unless a request has one of the keys."""
    sent = headers.get("authorization", "")
    if not keys.admit(sent.encode("latin-1")):
        message = "the key is wrong" if sent else "a key is needed"
        message += "; send Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key")


def replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body, then waits for the client to leave."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _too_large(most: int) -> ApiError:
    message = f"the body has more than {format_bytes(most)}; send fewer or smaller images"
    return ApiError(413, message, code="request_too_large")
