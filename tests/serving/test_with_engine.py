"""The server with the real engine and a tiny model of random weights."""

import asyncio
import gc
import json
import random
import re
import resource
import signal
import urllib.request

import pytest
from commands import start_command
from PIL import Image
from scripted import tiny_checkpoint
from serving.served import Served, data_uri, image_part, user

from qwenvl_lit import QwenVL
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.generation.continuous import WIDTH_MULTIPLE, ContinuousBatching
from qwenvl_lit.serving.app import Application
from qwenvl_lit.serving.auth import Keys
from qwenvl_lit.serving.images import ImageLoader
from qwenvl_lit.serving.service import Model, Service
from qwenvl_lit.serving.settings import ServeSettings

COLORS = ("red", "teal", "navy", "gold")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("published") / "tiny")
    return QwenVL.load(folder, dtype="float32", max_new_tokens=12)


@pytest.fixture
def served(model):
    processor = model.processor
    engine = ContinuousBatching(
        model.model,
        model.family,
        processor,
        collate=Pad(
            pad_id=processor.pad_id,
            collate_vision=processor.collate_vision,
            side="left",
            multiple_of=WIDTH_MULTIPLE,
        ),
        rows=4,
        slots=256,
    )
    described = Model(
        name="tiny", processor=processor, generation=model.generation, markup_in_answers=True
    )
    settings = ServeSettings(rows=4, context=256, queue=64)
    loader = ImageLoader(max_bytes=10**6, max_pixels=10**6, seconds=1.0)
    with engine:
        yield Served(engine, Application(Service(engine, described, settings, loader), Keys()))


def question(number):
    """A question with or without an image: as messages, and as `QwenVL.generate` takes it."""
    text = f"What is number {number}?"
    if number % 3 == 0:
        return user(text), text
    size, color = (20 + number, 30), COLORS[number % len(COLORS)]
    parts = image_part(data_uri(size, color=color)), text
    return user(*parts), [Image.new("RGB", size, color), text]


def test_answers_that_come_and_go_are_those_of_the_python_api(model, served):
    async def ask_all():
        async def ask(number):
            await asyncio.sleep(random.Random(number).random() / 20)
            response = await served.ask(question(number)[0], max_tokens=4 + number % 9)
            return response.json()

        return await asyncio.gather(*map(ask, range(24)))

    bodies = asyncio.run(ask_all())
    for number, body in enumerate(bodies):
        [answer] = model.generate([question(number)[1]], max_new_tokens=4 + number % 9)
        [choice] = body["choices"]
        assert choice["message"]["content"] == str(answer)
        assert body["usage"]["prompt_tokens"] == answer.prompt_tokens
        assert body["usage"]["completion_tokens"] == answer.new_tokens


def test_a_seed_repeats_an_answer(served):
    async def ask():
        fields = {"temperature": 1.5, "seed": 7, "n": 3, "logprobs": True, "top_logprobs": 2}
        return (await served.ask(user("a"), **fields)).json()["choices"]

    first, second = asyncio.run(ask()), asyncio.run(ask())
    assert first == second
    assert len({choice["message"]["content"] for choice in first}) > 1
    entry = first[0]["logprobs"]["content"][0]
    assert len(entry["top_logprobs"]) == 2
    assert entry["logprob"] < 0


def memory():
    """Megabytes of this process."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


async def soak(served, count, clients):
    """Asks `count` questions: one in ten is left, one in twenty is bad. Returns the statuses."""
    statuses, grown, numbers = [], [], iter(range(count))

    async def client():
        for number in numbers:
            messages, fields = question(number % 40)[0], {"max_tokens": 1 + number % 12}
            if number % 20 == 7:
                fields["beams"] = 2
            asking = asyncio.create_task(served.ask(messages, **fields))
            if number % 10 == 3:
                await asyncio.sleep(0.002)
                asking.cancel()
            try:
                statuses.append((await asking).status_code)
            except asyncio.CancelledError:
                statuses.append(None)
            if number % 1000 == 999:
                grown.append(memory())

    await asyncio.gather(*(client() for _ in range(clients)))
    return statuses, grown


def check_soak(served, count, statuses):
    assert len(statuses) == count
    assert set(statuses) <= {200, 400, None}
    assert statuses.count(None) > count // 20
    assert statuses.count(400) >= count // 20 - statuses.count(None)
    assert served.application.admission.taken == 0
    assert served.engine.drain(60.0)
    assert (served.engine.running, served.engine.waiting) == (0, 0)


def test_under_mixed_load_no_row_and_no_place_is_lost(served):
    statuses, _ = asyncio.run(soak(served, 120, clients=8))
    check_soak(served, 120, statuses)


@pytest.mark.slow
def test_a_long_soak_takes_no_memory(served):
    statuses, grown = asyncio.run(soak(served, 20_000, clients=16))
    check_soak(served, 20_000, statuses)
    assert max(grown[1:]) - grown[0] < 50


def test_the_command_serves_until_sigterm(tmp_path):
    process = start_command(tmp_path, "serve", "model=qwen_vl_tiny", "serve.port=0")
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
        assert first.startswith(
            "Serving qwen_vl_tiny: 32 answers at a time, of at most 2048 tokens"
        )
        url = re.match(r"(\S+) in a browser", second)[1]
        body = json.dumps({"messages": user("hi"), "max_tokens": 3}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["choices"][0]["finish_reason"] in ("length", "stop")
        with urllib.request.urlopen(url) as response:
            assert b"<!doctype html>" in response.read()
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0, rest
    assert rest == "INFO qwenvl_lit.serving.server: shutting down; 0 requests to answer\n"
