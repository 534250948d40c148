"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from qwenvl_lit.serving.answers import Answers
from qwenvl_lit.serving.auth import Keys
from qwenvl_lit.serving.completions import Completion
from qwenvl_lit.serving.errors import ApiError, refused_field, shutting_down
from qwenvl_lit.serving.gate import Admission, Gate
from qwenvl_lit.serving.schema import UNSUPPORTED, ChatRequest, GroundRequest
from qwenvl_lit.serving.service import Service

PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
LEFT = 499  # status of a request whose client has left; nobody reads it


class Application:
    """The ASGI application of a server, with what its end needs.

    Attributes:
        app: for uvicorn.
        admission: closed by whoever ends the server.
    """

    def __init__(self, service: Service, keys: Keys, *, page: Path = PAGE):
        self.service = service
        settings = service.settings
        self.admission = Admission(settings, service.metrics)
        self.started = int(time.time())
        routes = FastAPI(title="qwenvl_lit", docs_url=None, redoc_url=None)
        routes.add_exception_handler(ApiError, _api_error)
        routes.add_exception_handler(RequestValidationError, _bad_body)
        routes.add_exception_handler(HTTPException, _http_error)
        routes.add_exception_handler(Exception, _defect)
        routes.post("/v1/chat/completions")(self.chat)
        routes.post("/v1/ground")(self.ground)
        routes.get("/v1/models")(self.models)
        routes.get("/v1/models/{name:path}")(self.model)
        routes.get("/health")(self.ready)
        routes.get("/health/live")(self.live)
        routes.get("/health/ready")(self.ready)
        routes.get("/metrics")(self.metrics)
        routes.api_route("/v1/{rest:path}", methods=METHODS, include_in_schema=False)(self.unknown)
        # The folder is read when the first file of it is asked for.
        routes.mount("/", Page(directory=page, html=True, check_dir=False))
        self.app = Gate(
            routes,
            keys=keys,
            admission=self.admission,
            settings=settings,
            metrics=service.metrics,
        )

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        completion = await self.service.complete(body)
        if body.stream:
            return EventStream(completion)
        if not await _finished(completion.answers, request.receive):
            return Response(status_code=LEFT)
        return JSONResponse(completion.whole())

    async def ground(self, body: GroundRequest, request: Request) -> Response:
        completion = await self.service.ground(body)
        if not await _finished(completion.answers, request.receive):
            return Response(status_code=LEFT)
        return JSONResponse(completion.grounding(body.label))

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        if name != self.service.model.name:
            raise ApiError(404, f"there is no model {name[:100]!r}", code="model_not_found")
        return self._model()

    async def unknown(self, request: Request) -> None:
        message = (
            f"there is no {request.method} {request.url.path[:100]}; the server has POST "
            f"/v1/chat/completions, POST /v1/ground and GET /v1/models"
        )
        raise ApiError(404, message, code="unknown_url")

    async def live(self) -> dict[str, str]:
        return {"status": "live"}

    async def ready(self) -> dict[str, str]:
        engine = self.service.engine
        if not self.admission.is_open:
            raise shutting_down()
        if engine.failure is not None:
            raise ApiError(503, "the engine has failed; restart the server", code="engine_failed")
        if not engine.ready.is_set():
            raise ApiError(503, "the engine is warming up", code="starting")
        return {"status": "ready"}

    async def metrics(self) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.service.model.name,
            "object": "model",
            "created": self.started,
            "owned_by": "qwenvl_lit",
            "max_model_len": self.service.settings.context,
        }


class EventStream(StreamingResponse):
    """Streams a completion. Its rows are freed when the client leaves."""

    def __init__(self, completion: Completion):
        # nginx would collect events before it passes them on.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(completion.events(), media_type="text/event-stream", headers=headers)
        self.answers = completion.answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()


class Page(StaticFiles):
    """The files of the page, which may load nothing from elsewhere."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


async def _finished(answers: Answers, receive: Receive) -> bool:
    """Waits until all answers have ended. Returns False if the client leaves earlier."""
    ending = asyncio.create_task(answers.finished())
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((ending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            ending.result()  # raises what has failed
        return ending.done()
    finally:
        ending.cancel()
        leaving.cancel()
        answers.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _bad_body(request: Request, error: RequestValidationError) -> Response:
    return await _api_error(request, refused_field(error.errors(), UNSUPPORTED))


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = HTTPStatus(error.status_code).name.lower()  # such as not_found
    return await _api_error(request, ApiError(error.status_code, message[:300], code=code))


async def _defect(request: Request, error: Exception) -> Response:
    message = "the server has a defect; its log says which"
    return await _api_error(request, ApiError(500, message, code="internal_error"))
