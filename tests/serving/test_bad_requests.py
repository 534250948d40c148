"""Wrong and hostile requests: each is a 4xx with a body of OpenAI, and nothing is fetched."""

import asyncio
import base64
import io
import json
import socket
import struct
import zlib

import pytest
from PIL import Image
from serving.served import data_uri, image_part, user

FIELDS = {"message", "type", "param", "code"}
JSON = {"Content-Type": "application/json"}
URL = "messages[0].content[0].image_url.url"


def encoded(content: bytes, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_bomb(side: int) -> bytes:
    """A PNG of `side` x `side` pixels, whose rows are not even there."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


def truncated_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(file, "PNG")
    return file.getvalue()[:900]


def ask_about(url):
    return {"messages": user(image_part(url), "What is this?")}


IMAGES = {
    "a path": "/etc/passwd",
    "a relative path": "docs/car.png",
    "file": "file:///etc/passwd",
    "file in capitals": "FILE:///etc/passwd",
    "ftp": "ftp://example.com/a.png",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "no address": "",
    "loopback": "http://127.0.0.1:9/a.png",
    "metadata service": "http://169.254.169.254/latest/meta-data",
    "a host that is not allowed": "https://example.com/a.png",
    "user name": "http://allowed.example@127.0.0.1/a.png",
    "broken address": "http://[::1/a.png",
    "bad port": "http://allowed.example:99999/a.png",
    "not base64": "data:image/png;base64,@@@@",
    "cut base64": "data:image/png;base64,iVBOR",
    "not encoded": "data:image/png,abc",
    "no data": "data:image/png;base64,",
    "text": encoded(b"hello"),
    "an SVG": encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "a PostScript": encoded(b"%!PS-Adobe-3.0\n(x) run"),
    "a truncated PNG": encoded(truncated_png()),
    "a bomb": encoded(png_bomb(20000)),
    "a bomb within Pillow's limit": encoded(png_bomb(9000)),
    "more bytes than the limit": encoded(bytes(300_000)),
}

BODIES = {
    "no messages": {},
    "empty messages": {"messages": []},
    "messages as text": {"messages": "hi"},
    "an unknown role": {"messages": [{"role": "root", "content": "hi"}]},
    "a tool's message": {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
    "no content": {"messages": [{"role": "user"}]},
    "null content": {"messages": [{"role": "user", "content": None}]},
    "an empty question": {"messages": user("  ")},
    "no parts": {"messages": user()},
    "the assistant last": {"messages": [*user("a"), {"role": "assistant", "content": "b"}]},
    "an image of the system": {
        "messages": [{**user(image_part(data_uri()))[0], "role": "system"}, *user("a")]
    },
    "audio": {"messages": user({"type": "input_audio", "input_audio": {}})},
    "a name": {"messages": [{"role": "user", "content": "a", "name": "b"}]},
    "half a character": {"messages": user("\ud800")},
    "tools": {"messages": user("a"), "tools": [{"type": "function"}]},
    "a format": {"messages": user("a"), "response_format": {"type": "json_object"}},
    "a penalty": {"messages": user("a"), "frequency_penalty": 0.5},
    "an unknown field": {"messages": user("a"), "beams": 4},
    "too many images": {"messages": user(*[image_part(data_uri())] * 17, "a")},
    "too many answers": {"messages": user("a"), "n": 1000},
    "no answers": {"messages": user("a"), "n": 0},
    "a high temperature": {"messages": user("a"), "temperature": 3},
    "temperature as text": {"messages": user("a"), "temperature": "0.5"},
    "a boolean number": {"messages": user("a"), "max_tokens": True},
    "no tokens": {"messages": user("a"), "max_tokens": 0},
    "both limits": {"messages": user("a"), "max_tokens": 5, "max_completion_tokens": 5},
    "an empty stop": {"messages": user("a"), "stop": ""},
    "many stops": {"messages": user("a"), "stop": ["a", "b", "c", "d", "e"]},
    "a large seed": {"messages": user("a"), "seed": 2**70},
    "alternatives alone": {"messages": user("a"), "top_logprobs": 2},
    "usage of no stream": {"messages": user("a"), "stream_options": {"include_usage": True}},
    "a long text": {"messages": user("x" * 600_000)},
    "a long prompt": {"messages": user("word " * 3000)},
    "many messages": {"messages": user("a") * 3000},
}

CONTENTS = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "not UTF-8": b'{"messages": "\xff"}',
    "deep JSON": b"[" * 100_000,
    "not a number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "endless digits": b'{"seed": ' + b"1" * 5000 + b"}",
}


def refusal(response):
    """The error of a response, which must be in the format of OpenAI and of one line."""
    assert 400 <= response.status_code < 500, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == FIELDS
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["code"]
    assert "\n" not in body["error"]["message"]
    assert len(body["error"]["message"]) < 500
    return body["error"]


async def post_json(served, body):
    """Posts a body that httpx would refuse to encode."""
    options = {"content": json.dumps(body).encode(), "headers": JSON}
    return await served.post("/v1/chat/completions", **options)


@pytest.fixture
def nothing_is_fetched(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def strict(server):
    limits = {"max_image_mb": 0.2, "allowed_hosts": ["allowed.example"]}
    served = server("yes", **limits)
    yield served
    assert not served.engine.handles, "a bad request reached the engine"


@pytest.mark.usefixtures("nothing_is_fetched")
def test_bad_images_are_refused_with_the_field_that_is_wrong(strict):
    async def answers():
        for name, url in IMAGES.items():
            yield name, await strict.post("/v1/chat/completions", json=ask_about(url))

    async def check():
        async for name, response in answers():
            error = refusal(response)
            assert error["message"].startswith((URL, "messages")), name
            assert error["param"] in (URL, "messages"), name
            assert "/etc/" not in error["message"] or name in ("a path", "file", "file in capitals")

    asyncio.run(check())


def test_bad_bodies_are_refused(strict):
    async def check():
        for body in BODIES.values():
            response = await post_json(strict, body)
            assert response.status_code == 400
            refusal(response)

    asyncio.run(check())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/ground"])
def test_what_is_no_json_object_is_refused(strict, path):
    async def check():
        for content in CONTENTS.values():
            refusal(await strict.post(path, content=content, headers=JSON))
            refusal(await strict.post(path, content=content))

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BODIES["tools"], "tools is not supported by this server; leave it out"),
        (BODIES["an unknown field"], "beams is no field that this server knows; leave it out"),
        (BODIES["no messages"], "messages is missing"),
        (
            {"messages": user({"type": "image_url", "image_url": "https://a.example/a.png"})},
            'messages[0].content[0].image_url must be a JSON object, {"url": "data:image/png',
        ),
        (BODIES["too many images"], "there are more than 16 images"),
        (
            BODIES["an unknown role"],
            "messages[0].role must be system, developer, user or assistant, got 'root'",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].role is missing"),
        (BODIES["audio"], "messages[0].content[0].type must be text or image_url, got 'input_a"),
        (BODIES["null content"], "messages[0].content must be text or a list, got null"),
        (BODIES["empty messages"], "messages is empty"),
        (BODIES["many messages"], "messages has at most 2048 entries, got 3000"),
        (BODIES["many stops"], "stop has at most 4 entries, got 5"),
        (BODIES["an empty stop"], "stop[0] is empty"),
        ({"messages": user("a"), "stop": "x" * 300}, "stop[0] has at most 256 characters, got 300"),
        (BODIES["no answers"], "n must be at least 1, got 0"),
        (BODIES["a high temperature"], "temperature must be at most 2, got 3"),
        (BODIES["temperature as text"], "temperature must be a number, got '0.5'"),
        (BODIES["a boolean number"], "max_tokens must be a whole number, got true"),
        (BODIES["a large seed"], "seed must be below 9223372036854775808, got 1180591620717411"),
        ({"messages": user("a"), "max_tokens": 1.5}, "max_tokens must be a whole number, got 1.5"),
        ({"messages": user("a"), "top_p": 0}, "top_p must be above 0, got 0"),
        ({"messages": user("a"), "stream": "yes"}, "stream must be true or false, got 'yes'"),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}})},
            "messages[0].content[0].image_url.detail must be auto or high, got 'low'",
        ),
        (BODIES["both limits"], "give max_tokens or max_completion_tokens, not both"),
        (BODIES["half a character"], "messages[0].content[0].text: the text is not valid UTF-8"),
        (
            ask_about(IMAGES["a bomb"]),
            f"{URL}: the image cannot be read as an image: Image size",
        ),
        (ask_about(IMAGES["a bomb within Pillow's limit"]), f"{URL}: the image has 9000 x 9000"),
        (ask_about(IMAGES["more bytes than the limit"]), f"{URL}: the image has more than 200 kB"),
        (ask_about(IMAGES["loopback"]), f"{URL}: images are not fetched from '127.0.0.1:9': the"),
        (ask_about(IMAGES["file"]), f"{URL}: 'file:///etc/passwd' is no image; give a data"),
    ],
)
def test_a_message_says_what_is_wrong(strict, body, message):
    assert refusal(asyncio.run(post_json(strict, body)))["message"].startswith(message)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"image": "/etc/passwd", "label": "a"}, "image"),
        ({"image": data_uri(), "label": " "}, "label"),
        ({"image": data_uri()}, "label"),
        ({"image": data_uri(), "label": "a", "prompt": "b"}, "prompt"),
        ({"image": data_uri(), "label": "x" * 3000}, "label"),
    ],
)
def test_bad_questions_for_boxes_are_refused(strict, body, param):
    response = asyncio.run(strict.post("/v1/ground", json=body))
    assert refusal(response)["param"] == param


def test_another_model_and_another_path_are_404(strict):
    async def check():
        other = await strict.ask(user("a"), model="gpt-5")
        assert (other.status_code, refusal(other)["code"]) == (404, "model_not_found")
        for path in ("/v1/completions", "/v1/embeddings", "/v1/audio/speech"):
            missing = await strict.post(path, json={"prompt": "a"})
            assert (missing.status_code, refusal(missing)["code"]) == (404, "unknown_url")
        nowhere = await strict.post("/nowhere")
        assert (nowhere.status_code, refusal(nowhere)["code"]) == (405, "method_not_allowed")

    asyncio.run(check())
