"""A server in this process, with a tiny processor and given answers."""

import base64
import io

import httpx
from PIL import Image
from scripted import TAGS
from serving.fake_engine import FakeEngine
from tiny import tiny_family

from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.serving.app import Application
from qwenvl_lit.serving.auth import Keys
from qwenvl_lit.serving.images import ImageLoader
from qwenvl_lit.serving.service import Model, Service
from qwenvl_lit.serving.settings import ServeSettings

PROCESSOR = tiny_family().processor()
BASE_PROCESSOR = tiny_family(template="raw").processor()
DOG = "<ref>the dog</ref><box>(250,500),(500,999)</box>"


def data_uri(size=(40, 20), kind="PNG", color="teal") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def ids_of(text: str) -> list[int]:
    return PROCESSOR.tokenizer.encode(text, allowed_special=TAGS)


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*content) -> list[dict]:
    """The messages of a question: texts, and images as parts."""
    parts = []
    for part in content:
        parts.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return [{"role": "user", "content": parts}]


class Served:
    """An application with its engine, and a client of it."""

    def __init__(self, engine: FakeEngine, application: Application):
        self.engine, self.application = engine, application
        self.transport = httpx.ASGITransport(application.app, raise_app_exceptions=False)

    def client(self, **options) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=self.transport, base_url="http://server", **options)

    async def post(self, path: str, **options) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, **options)

    async def ask(self, messages, headers=None, **fields) -> httpx.Response:
        body = {"messages": messages, **fields}
        return await self.post("/v1/chat/completions", json=body, headers=headers)

    def prompts(self) -> list[str]:
        """The prompts that the engine has got, as text."""
        prompts = []
        for handle in self.engine.handles:
            prompts.append(PROCESSOR.text(handle.request.prompt.input_ids.tolist()))
        return prompts


def serves(
    answer="yes",
    *,
    keys=(),
    page=None,
    base=False,
    generation=None,
    rows=4,
    queue=64,
    engine_queue=None,
    step=0.0,
    fails=None,
    **settings,
) -> Served:
    """A server whose every answer is this text, or what a function makes of the request."""
    make = answer if callable(answer) else lambda request: ids_of(answer)
    settings = ServeSettings(**{"rows": rows, "queue": queue, "context": 2048, **settings})
    waiting = engine_queue or settings.most_answers
    engine = FakeEngine(make, rows=rows, queue=waiting, step=step, fails=fails)
    model = Model(
        name="tiny",
        processor=BASE_PROCESSOR if base else PROCESSOR,
        generation=generation or Generation(max_new_tokens=64),
        markup_in_answers=True,
    )
    loader = ImageLoader(
        allowed_hosts=settings.allowed_hosts,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        seconds=settings.image_s,
    )
    options = {} if page is None else {"page": page}
    served = Served(
        engine, Application(Service(engine, model, settings, loader), Keys(keys), **options)
    )
    engine.start()
    return served
