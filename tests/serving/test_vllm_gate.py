"""What requests pass in front of vLLM's server: keys for all routes, and limits of bodies."""

import asyncio

import httpx
import pytest

from qwenvl_lit.serving.vllm.gate import RequestGate

KEYS = ["first-of-the-keys", "second-of-the-keys"]


async def echo(scope, receive, send):
    """An application that answers with the body that it has got."""
    body = (await receive()).get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def gate(tmp_path, monkeypatch):
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(KEYS))
    monkeypatch.setenv("QWENVL_LIT_KEYS", str(keys))
    monkeypatch.setenv("QWENVL_LIT_MAX_BODY_BYTES", "1000")
    monkeypatch.setenv("QWENVL_LIT_BODY_SECONDS", "0.05")
    return RequestGate(echo)


def send(app, method, path, key=None, **options) -> httpx.Response:
    async def sent():
        transport = httpx.ASGITransport(app)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(sent())


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/tokenize", "/docs", "//health"])
def test_every_route_needs_one_of_the_keys(gate, path):
    for key in (None, "wrong", KEYS[0][:-1]):
        response = send(gate, "POST", path, key)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in KEYS:
        assert send(gate, "POST", path, key, content=b"hello").content == b"hello"


def test_what_watches_a_server_and_what_browsers_ask_first_needs_none(gate):
    for path in ("/health", "/metrics", "/ping"):
        assert send(gate, "GET", path).status_code == 200
    assert send(gate, "OPTIONS", "/v1/chat/completions").status_code == 200


def test_without_a_file_of_keys_everybody_may_ask(gate, monkeypatch):
    monkeypatch.delenv("QWENVL_LIT_KEYS")
    assert send(RequestGate(echo), "POST", "/v1/models").status_code == 200


def test_a_large_body_is_refused_also_if_it_does_not_say_its_size(gate):
    async def pieces():
        for _ in range(11):
            yield b" " * 100

    for content in (b" " * 1001, pieces()):
        response = send(gate, "POST", "/v1/models", KEYS[0], content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_a_body_that_does_not_arrive_is_given_up(gate):
    async def slow():
        yield b"{"
        await asyncio.sleep(0.3)

    response = send(gate, "POST", "/v1/models", KEYS[0], content=slow())
    assert response.status_code == 408


def test_a_websocket_without_a_key_is_closed(gate):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def keep(message):
        sent.append(message)

    asyncio.run(gate({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, keep))
    assert [message["type"] for message in sent] == ["websocket.close"]
