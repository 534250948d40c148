"""The server over real sockets: the openai client, large and slow requests, and its end."""

import asyncio
import json
import os
import signal
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from serving.served import DOG, data_uri, image_part, user

from qwenvl_lit.serving import gate
from qwenvl_lit.serving import server as server_module
from qwenvl_lit.serving.server import bind, serve, url_of
from qwenvl_lit.types import DataError


def running(served, use, *, grace_s=5.0):
    """Runs `use` with the address of a server, which SIGTERM then ends. Returns its result."""

    async def main():
        bound = bind("127.0.0.1", 0)
        started = asyncio.Event()
        ending = serve(
            served.application, served.engine, bound, grace_s=grace_s, on_start=started.set
        )
        task = asyncio.create_task(ending)
        await started.wait()
        try:
            return await use(url_of(bound))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await task

    return asyncio.run(main())


def test_the_openai_client_gets_whole_answers_streams_and_errors(server):
    served = server(f"see {DOG}", keys=["good-key-1"])
    question = user(image_part(data_uri()), "Where is the dog?")

    async def use(url):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="good-key-1", max_retries=0)
        assert [model.id async for model in client.models.list()] == ["tiny"]
        ask = client.chat.completions.create
        whole = await ask(model="tiny", messages=question)
        [choice] = whole.choices
        assert choice.message.content == f"see {DOG}"
        assert choice.message.model_extra["objects"][0]["label"] == "the dog"
        again = [*question, choice.message.model_dump(), *user("Sure?")]
        assert (await ask(model="tiny", messages=again)).choices[0].finish_reason == "stop"

        text, objects, usage = "", None, None
        options = {"include_usage": True}
        async for chunk in await ask(
            model="tiny", messages=question, stream=True, stream_options=options
        ):
            usage = chunk.usage
            for streamed in chunk.choices:
                text += streamed.delta.content or ""
                objects = streamed.delta.model_extra.get("objects", objects)
        assert text == f"see {DOG}"
        assert objects == choice.message.model_extra["objects"]
        assert usage == whole.usage

        with pytest.raises(openai.BadRequestError) as refused:
            await ask(model="tiny", messages=question, tools=[{"type": "function"}])
        assert (refused.value.param, refused.value.code) == ("tools", "unsupported_field")
        with pytest.raises(openai.NotFoundError):
            await ask(model="other", messages=question)
        stranger = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()

    running(served, use)


async def talk(url, *pieces, pause=0.0):
    """What the server answers to these bytes, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)
    try:
        return (await asyncio.wait_for(reader.read(), 60)).decode()
    finally:
        writer.close()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def test_a_gigabyte_is_refused_before_it_is_sent(server):
    async def use(url):
        large = HEAD + b"Content-Length: 1000000000\r\n\r\n"
        assert (await talk(url, large)).startswith("HTTP/1.1 413")
        endless = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        assert (await talk(url, endless, *[chunk] * 9)).startswith("HTTP/1.1 413")

    running(server(max_body_mb=0.1), use)


def test_a_client_that_sends_much_sees_why_it_is_refused(server):
    served = server(keys=["good-key-1"])

    async def use(url):
        body = {"messages": user("x" * 5_000_000)}
        async with httpx.AsyncClient() as client:
            for _ in range(5):
                response = await client.post(f"{url}/v1/chat/completions", json=body)
                assert response.json()["error"]["code"] == "invalid_api_key"

    running(served, use)


def test_a_slow_body_is_given_up(server, monkeypatch):
    monkeypatch.setattr(gate, "LINGER_SECONDS", 0.05)

    async def use(url):
        response = await talk(url, HEAD + b"Content-Length: 100\r\n\r\n", b"{", b"{", pause=0.05)
        assert response.startswith("HTTP/1.1 408")

    running(server(body_s=0.2), use)


def test_a_broken_connection_frees_the_row(server):
    served = server("x" * 60, step=0.02)

    async def use(url):
        async with httpx.AsyncClient() as client:
            body = {"messages": user("a"), "stream": True}
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
        left = time.perf_counter()
        [handle] = served.engine.handles
        while handle.freed_at is None:
            await asyncio.sleep(0.005)
        assert handle.freed_at - left < 0.6, "half of its time"

    running(served, use)


def test_after_sigterm_running_answers_end_and_new_ones_are_refused(server):
    served = server("x" * 30, step=0.02)

    async def use(url):
        async with httpx.AsyncClient() as client, httpx.AsyncClient() as late:
            body = {"messages": user("a")}
            path = f"{url}/v1/chat/completions"
            first = asyncio.create_task(client.post(path, json=body))
            while not served.engine.handles:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            while served.application.admission.is_open:
                await asyncio.sleep(0.01)
            refused = await late.post(path, json=body)
            assert refused.status_code == 503
            answer = (await first).json()["choices"][0]
            assert (answer["message"]["content"], answer["finish_reason"]) == ("x" * 30, "stop")

    start = time.monotonic()
    running(served, use, grace_s=300.0)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("signals", [1, 2])
def test_what_outlasts_the_grace_time_is_told_so(server, signals):
    served = server("x" * 60, step=1.0)

    async def use(url):
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"messages": user("a"), "stream": True}
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
                    await asyncio.sleep(0.01)
                text = "".join([line async for line in response.aiter_lines()])
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "shutting_down"

    start = time.monotonic()
    running(served, use, grace_s=2.2 if signals == 1 else 300.0)
    assert time.monotonic() - start < 40


def test_an_address_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DataError, match=rf"serve\.port={port}: Address already in use"):
            bind("127.0.0.1", port)
    for host in ("no.such.host.invalid", "203.0.113.77"):  # the second is for documentation
        with pytest.raises(DataError, match=rf"serve\.host={host} .*is an address of this machine"):
            bind(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_address_that_is_printed_can_be_opened(host):
    with bind(host, 0) as bound:
        bound.listen()
        address = urlsplit(url_of(bound))
        assert address.hostname not in ("0.0.0.0", "localhost")
        if host == "127.0.0.1":
            assert address.hostname == host
        with socket.create_connection((address.hostname, address.port), timeout=10):
            pass


def test_without_a_network_the_name_of_the_machine_is_printed(monkeypatch):
    monkeypatch.setattr(server_module, "ELSEWHERE", ("255.255.255.255", 9))  # is refused
    with bind("0.0.0.0", 0) as bound:
        assert url_of(bound).startswith(f"http://{socket.gethostname()}:")


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closing_terminal_ends_the_server_unless_it_was_started_with_nohup(server, is_ignored):
    served = server()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)

    async def use(url):
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.2)
        return served.application.admission.is_open

    try:
        assert running(served, use) is is_ignored
    finally:
        signal.signal(signal.SIGHUP, before)
