"""Places, limits of size and time, and clients that leave."""

import asyncio
import json
import re
import time

import pytest
from serving.served import ids_of, user

from qwenvl_lit.serving import gate

QUESTION = json.dumps({"messages": user("a")}).encode()
STREAMED = json.dumps({"messages": user("a"), "stream": True}).encode()


class Connection:
    """What a server of ASGI passes to an application.

    Args:
        chunks: of the body; None: the next one never comes.
        length: the header Content-Length.
        reads: whether the client reads what it is sent.
    """

    def __init__(self, *chunks, length=None, path="/v1/chat/completions", reads=True):
        headers = [(b"content-type", b"application/json")]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": headers,
            "server": ("server", 80),
            "client": ("client", 1),
        }
        self.chunks = list(chunks)
        self.reads = reads
        self.received = 0
        self.received_before = None  # messages before the response began
        self.left = asyncio.Event()
        self.status = None
        self.headers = {}
        self.body = b""

    async def receive(self):
        self.received += 1
        if not self.chunks:
            await self.left.wait()
            return {"type": "http.disconnect"}
        chunk = self.chunks.pop(0)
        if chunk is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": chunk, "more_body": bool(self.chunks)}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.received_before = self.received
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif not self.reads:
            await asyncio.sleep(60)
        self.body += message.get("body", b"")

    async def run(self, served):
        await served.application.app(self.scope, self.receive, self.send)
        return self

    @property
    def error(self):
        return json.loads(self.body)["error"]


def respond(served, *chunks, **options) -> Connection:
    async def run():
        return await Connection(*chunks, **options).run(served)

    return asyncio.run(run())


async def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.002)


# Bodies


@pytest.mark.parametrize("length", [10**9, 10**30, "-1", "1e3", "²"])
def test_a_body_that_says_it_is_too_large_is_not_read(server, length):
    connection = respond(server(), b"{", length=length)
    assert (connection.status, connection.error["code"]) == (413, "request_too_large")
    assert connection.headers["connection"] == "close"
    assert connection.received_before == 0


def test_a_body_of_unknown_length_is_read_up_to_the_limit(server):
    connection = respond(server(max_body_mb=0.01), *[b"x" * 4000] * 9)
    assert (connection.status, connection.received_before) == (413, 3)


def test_a_body_may_come_in_pieces(server):
    assert respond(server(), QUESTION[:9], QUESTION[9:], b"").status == 200


def test_a_slow_body_times_out_and_gives_its_place_back(server, monkeypatch):
    monkeypatch.setattr(gate, "LINGER_SECONDS", 0.05)
    served = server(body_s=0.05)
    connection = respond(served, b"{", None)
    assert (connection.status, connection.error["code"]) == (408, "request_timeout")
    assert served.application.admission.taken == 0


def test_bodies_are_read_only_for_the_api(server, tmp_path):
    connection = respond(server(page=tmp_path), b"x", path="/")
    assert (connection.status, connection.received) == (405, 0)


# Places


def test_without_a_place_a_request_is_refused_unread_with_the_time_to_wait(server):
    async def check():
        served = server("yes" * 9, rows=1, queue=1, step=0.01)
        running = [Connection(QUESTION), Connection(QUESTION)]
        tasks = [asyncio.create_task(connection.run(served)) for connection in running]
        await until(lambda: served.application.admission.taken == 2)
        refused = await Connection(QUESTION).run(served)
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert refused.error["type"] == "rate_limit_error"
        message = r"busy with 2 requests, .* \(serve.rows=1 \+ serve.queue=1\); try again in 1 s$"
        assert re.search(message, refused.error["message"])
        assert refused.headers["retry-after"] == "1"
        assert refused.received_before == 0
        await asyncio.gather(*tasks)
        assert [connection.status for connection in running] == [200, 200]
        assert (await Connection(QUESTION).run(served)).status == 200

    asyncio.run(check())


def test_if_only_some_answers_fit_into_the_queue_none_is_given(server):
    served = server("yes" * 50, rows=1, engine_queue=1, step=0.005)
    response = asyncio.run(served.ask(user("a"), n=4))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert all(handle.cancelled_at for handle in served.engine.handles)
    assert "qwenvl_answers_total{" not in served.application.service.metrics.text().decode()


@pytest.mark.parametrize("n", [1, 8])
def test_the_queue_counts_requests_however_many_answers_they_want(server, n):
    async def check():
        served = server("yes" * 9, rows=1, queue=1, step=0.01)
        responses = await asyncio.gather(*[served.ask(user("a"), n=n) for _ in range(10)])
        assert sorted(response.status_code for response in responses) == [200] * 2 + [429] * 8
        return served.application.service.metrics.text().decode()

    text = asyncio.run(check())
    assert f'qwenvl_answers_total{{reason="stop"}} {2.0 * n}' in text
    assert "cancelled" not in text


def test_under_overload_the_accepted_are_as_fast_as_before(server):
    async def steps(served):
        start = served.engine.steps
        response = await served.ask(user("a"))
        return response.status_code, served.engine.steps - start

    async def check(clients):
        served = server("0123456789", rows=4, queue=4, step=0.005)
        results = await asyncio.gather(*[steps(served) for _ in range(clients)])
        assert {status for status, _ in results} <= {200, 429}
        return [taken for status, taken in results if status == 200]

    alone = asyncio.run(check(8))
    overloaded = asyncio.run(check(80))
    assert len(alone) == 8
    assert len(overloaded) >= 8
    assert max(overloaded) <= 2 * max(alone)


def test_while_the_server_drains_it_is_not_ready_and_refuses(server):
    served = server()

    async def check():
        served.application.admission.is_open = False
        async with served.client() as client:
            paths = ("/health/live", "/health/ready", "/health", "/v1/models")
            statuses = [(await client.get(path)).status_code for path in paths]
        assert statuses == [200, 503, 503, 200]
        response = await served.ask(user("a"))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in response.headers

    asyncio.run(check())


def test_readiness_follows_the_engine(server):
    served = server()

    async def status():
        async with served.client() as client:
            return (await client.get("/health/ready")).status_code

    assert asyncio.run(status()) == 200
    served.engine.ready.clear()
    assert asyncio.run(status()) == 503
    served.engine.ready.set()
    served.engine.failure = RuntimeError("CUDA")
    assert asyncio.run(status()) == 503


# Clients that leave


@pytest.mark.parametrize("question", [QUESTION, STREAMED])
def test_the_row_of_a_client_that_leaves_is_freed_at_once(server, question):
    async def seconds_until_free():
        served = server("x" * 60, step=0.01)
        connection = Connection(question)
        task = asyncio.create_task(connection.run(served))
        await until(lambda: served.engine.handles and served.engine.handles[0].sent > 3)
        connection.left.set()
        left = time.perf_counter()
        await task
        [handle] = served.engine.handles
        await until(lambda: handle.freed_at)
        assert served.application.admission.taken == 0
        return handle.freed_at - left

    # Other work on the machine may hold up one try.
    assert min(asyncio.run(seconds_until_free()) for _ in range(3)) < 0.1


def test_a_client_that_reads_nothing_is_let_go(server, monkeypatch):
    monkeypatch.setattr(gate, "SEND_SECONDS", 0.05)
    served = server("x" * 60, step=0.01)
    respond(served, STREAMED, reads=False)
    assert served.engine.handles[0].cancelled_at
    assert served.application.admission.taken == 0


def test_a_client_that_leaves_within_its_request_costs_nothing(server):
    async def check():
        served = server()
        connection = Connection(b"{", b"")
        connection.chunks.pop()
        connection.left.set()
        connection.chunks = []
        await connection.run(served)
        assert not served.engine.handles
        assert served.application.admission.taken == 0

    asyncio.run(check())


def test_metrics_count_responses_answers_and_tokens(server):
    served = server("yes")

    async def check():
        await served.ask(user("a"))
        await served.ask(user("a"), bogus=1)
        async with served.client() as client:
            await client.get("/v1/models")
            await client.get("/health/live")
            return (await client.get("/metrics")).text.splitlines()

    lines = asyncio.run(check())
    assert 'qwenvl_responses_total{path="/v1/chat/completions",status="200"} 1.0' in lines
    assert 'qwenvl_responses_total{path="/v1/chat/completions",status="400"} 1.0' in lines
    assert 'qwenvl_responses_total{path="/health/live",status="200"} 1.0' in lines
    assert 'qwenvl_answers_total{reason="stop"} 1.0' in lines
    assert f"qwenvl_new_tokens_total {float(len(ids_of('yes')))}" in lines
    assert "qwenvl_rows_running 0.0" in lines
    assert "qwenvl_first_token_seconds_count 1.0" in lines
