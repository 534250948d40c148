"""Measures continuous batching, in this process and over HTTP.

    python scripts/bench_serve.py --record benchmarks/serve.json
    python scripts/bench_serve.py --model qwen3_vl_8b --record benchmarks/serve_qwen3_vl.json
    python scripts/bench_serve.py --size small --device cpu    # tries the script without a GPU

Random weights of the published sizes, prompts of about 300 tokens with an image of its own each,
and 64 new tokens. Measured are:

- raw: batches of 1, 8 and 32 rows, one after the other, with their prompts;
- closed: 1, 8 and 32 clients, each of which asks again when it has its answer;
- open: requests that come at random, at 70 % of the rate of 32 clients;
- http: the same with `python -m qwenvl_lit.serve` and streamed answers.
"""

from __future__ import annotations

import argparse
import base64
import gc
import http.client
import io
import itertools
import json
import random
import re
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_generate import NEW, TINY, Measured, family_of, measure_decoding, record, report
from PIL import Image

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.generation.continuous import WIDTH_MULTIPLE, ContinuousBatching
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.generation.request import Request
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.protocols import Family
from qwenvl_lit.types import Conversation, ImageSource, Turn

CONTEXT = 512  # tokens of a request
TOKENS = 151643  # of the published vocabularies, without special tokens
CLIENTS = (1, 8, 32)
SHARE = 0.7  # of the rate of 32 clients, at which requests come in "open"
NOTE = (
    "closed: rates are those while all clients ask, prompts included. share_of_raw compares them "
    "with the raw rate of as many rows, prompts included. between tokens: of all tokens but the "
    "first of each answer; over HTTP, of pieces of text"
)


@dataclass
class Answer:
    """When an answer was asked for and when its tokens arrived, in seconds of one clock.

    Over HTTP, pieces of text arrive, and a piece may have several tokens.
    """

    asked: float
    arrived: list[float] = field(default_factory=list)
    tokens: int | None = None  # None: as many as have arrived

    @property
    def first(self) -> float:
        """The time to the first token."""
        return self.arrived[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """The times between tokens."""
        return [after - before for before, after in zip(self.arrived, self.arrived[1:])]  # noqa: B905


Ask = Callable[[int], Answer]  # answers the request of this number, and blocks


def closed(ask: Ask, clients: int, count: int) -> Measured:
    """Lets `clients` ask `count` requests in total, each client one at a time."""
    answers: list[Answer] = []
    numbers = iter(range(count))
    lock = threading.Lock()
    ends = []

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                ends.append(time.perf_counter())
                return
            answers.append(ask(number))

    in_threads([client] * clients)
    # While all clients ask: from their first answers to the moment when the first of them ends.
    begin = sorted(answer.arrived[-1] for answer in answers)[min(clients, count) - 1]
    end = min(ends)
    if end <= begin:  # few requests
        begin, end = min(answer.asked for answer in answers), max(ends)
    tokens = 0.0
    for answer in answers:
        arrived = sum(begin < moment <= end for moment in answer.arrived)
        tokens += arrived / len(answer.arrived) * (answer.tokens or len(answer.arrived))
    rate = tokens / (end - begin)
    return {"clients": clients, "requests": count, "tokens_per_s": rate, **times(answers)}


def open_loop(ask: Ask, rate: float, count: int) -> Measured:
    """Asks `count` requests at random moments, on average `rate` per second."""
    choose = random.Random(0)
    moments = [0.0]
    while len(moments) < count:
        moments.append(moments[-1] + choose.expovariate(rate))
    answers: list[Answer] = []
    start = time.perf_counter()

    def client(number: int) -> None:
        time.sleep(max(0.0, start + moments[number] - time.perf_counter()))
        answers.append(ask(number))

    in_threads([partial(client, number) for number in range(count)])
    return {"requests_per_s": rate, "requests": count, **times(answers)}


def in_threads(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def times(answers: Sequence[Answer]) -> Measured:
    firsts = [answer.first for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    measured = {}
    for name, values in {"first_token": firsts, "between_tokens": gaps}.items():
        measured[f"{name}_p50_ms"] = 1000 * percentile(values, 0.5)
        measured[f"{name}_p99_ms"] = 1000 * percentile(values, 0.99)
    return measured


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that is not below `share` of the values.

    >>> percentile([1, 2, 3, 4], 0.5)
    2
    """
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]


# -- what is asked ---------------------------------------------------------------------------------


def image(number: int) -> bytes:
    """Returns a JPEG of 640 x 480 pixels, another one for each number."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    enlarged = Image.fromarray(noise.numpy()).resize((640, 480), Image.Resampling.BICUBIC)
    enlarged.save(file, "JPEG", quality=90)
    return file.getvalue()


def question(number: int) -> str:
    return f"Where is thing {number}?"


def conversation(number: int) -> Conversation:
    parts = (ImageSource(image(number)), question(number))
    return Conversation(id="question", turns=(Turn(role="user", parts=parts),))


def write_vocabulary(file: Path) -> None:
    """Writes a vocabulary of the published size, in which every token is a text.

    Random weights choose any of the published ids. Those beyond a small vocabulary have no text,
    and the server sends no events for them.
    """
    lines = TINY_VOCABULARY.read_text().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    words = ("".join(word).encode() for word in letters)
    known = set(tokens)
    new = (word for word in words if word not in known)
    tokens += itertools.islice(new, TOKENS - len(tokens))
    with file.open("w") as out:
        for rank, token in enumerate(tokens):
            out.write(f"{base64.b64encode(token).decode()} {rank}\n")


def engine_asks(engine: ContinuousBatching, samples: Sequence[Any]) -> Ask:
    def ask(number: int) -> Answer:
        ended = threading.Event()

        def receive(tokens: Sequence[Any], reason: str | None) -> None:
            answer.arrived += [time.perf_counter()] * len(tokens)
            if reason is not None:
                ended.set()

        prompt = samples[number % len(samples)]
        answer = Answer(time.perf_counter())
        engine.submit(Request(prompt=prompt, max_new_tokens=NEW), receive)
        ended.wait()
        return answer

    return ask


def server_asks(port: int, bodies: Sequence[bytes]) -> Ask:
    def ask(number: int) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        answer = Answer(time.perf_counter())
        body = bodies[number % len(bodies)]
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                answer.arrived.append(time.perf_counter())
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
        if not answer.arrived:  # an answer without text
            answer.arrived.append(time.perf_counter())
        connection.close()
        return answer

    return ask


def body_of(number: int) -> bytes:
    address = "data:image/jpeg;base64," + base64.b64encode(image(number)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "text", "text": question(number)},
    ]
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": NEW, "stream": True}
    return json.dumps({**body, "stream_options": {"include_usage": True}}).encode()


@contextmanager
def server(command: Sequence[str]) -> Iterator[int]:
    """Runs the server, and yields its port once it answers."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = None
        for line in process.stdout:
            if found := re.search(r"http://[\w.]+:(\d+)", line):
                port = int(found[1])
                break
        if port is None:
            sys.exit(f"the server has ended with {process.wait()}")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


def server_command(arguments: argparse.Namespace, vocabulary: Path) -> list[str]:
    command = [sys.executable, "-m", "qwenvl_lit.serve", "serve.port=0"]
    if arguments.size == "full":
        command += [f"model={arguments.model}", "model.weights=random"]
        command += [f"model.vocabulary={vocabulary}", f"model.dtype={arguments.dtype}"]
    else:
        command += [f"model={TINY[arguments.model.partition('_vl')[0]]}"]
    command += [f"device={arguments.device}", f"serve.rows={max(CLIENTS)}"]
    return [*command, f"serve.context={CONTEXT}", f"generation.max_new_tokens={NEW}"]


# -- measurements ----------------------------------------------------------------------------------


def measure(ask: Ask, arguments: argparse.Namespace) -> Measured:
    """Measures all loads on one way to ask."""
    for number in range(2):  # what a first request may still compile or capture
        ask(number)
    results: Measured = {"closed": []}
    for clients in CLIENTS:
        results["closed"].append(closed(ask, clients, max(clients, 2) * arguments.rounds))
        report(results["closed"][-1])
    rate = SHARE * results["closed"][-1]["tokens_per_s"] / NEW
    results["open"] = open_loop(ask, rate, max(CLIENTS) * arguments.rounds)
    report(results["open"])
    return results


def measure_engine(family: Family, arguments: argparse.Namespace) -> Measured:
    """Measures raw batches and the engine with the same weights."""
    on_gpu = arguments.device.startswith("cuda")
    model = family.load(arguments.device)
    results: Measured = {"raw": []}
    for rows in CLIENTS:
        results["raw"].append(measure_decoding(model, family, rows, compiled=on_gpu, on_gpu=on_gpu))
        report(results["raw"][-1])
    Generation.release(model)
    processor = family.processor()
    samples = []
    for number in range(max(CLIENTS) * arguments.rounds):
        samples.append(processor.encode(conversation(number), prompt=True))
    results["prompt_tokens"] = len(samples[0].input_ids)
    processor.stop_ids = ()
    pad = Pad(
        pad_id=processor.pad_id,
        collate_vision=processor.collate_vision,
        side="left",
        multiple_of=WIDTH_MULTIPLE,
    )
    start = time.perf_counter()
    options = {"rows": max(CLIENTS), "slots": CONTEXT, "prompt_tokens": arguments.prompt_tokens}
    with ContinuousBatching(model, family, processor, collate=pad, **options) as engine:
        engine.ready.wait()
        results["warm_up_s"] = time.perf_counter() - start
        results["engine"] = measure(engine_asks(engine, samples), arguments)
    add_shares(results["engine"], results["raw"])
    return results


def measure_server(arguments: argparse.Namespace, vocabulary: Path) -> Measured:
    """Measures `python -m qwenvl_lit.serve` with weights of its own."""
    gc.collect()
    if arguments.device.startswith("cuda"):
        torch.cuda.empty_cache()
    bodies = [body_of(number) for number in range(max(CLIENTS) * arguments.rounds)]
    with server(server_command(arguments, vocabulary)) as port:
        return measure(server_asks(port, bodies), arguments)


def add_shares(results: Measured, raw: Sequence[Measured]) -> None:
    """Compares the rates of clients with those of as many rows."""
    for measured, rows in zip(results["closed"], raw, strict=True):
        share = measured["tokens_per_s"] / rows["tokens_per_s_with_prefill"]
        measured["share_of_raw"] = share
        print(f"{measured['clients']} clients: {share:.0%} of the raw rate", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", default="qwen_vl_chat", help="of conf/model")
    option("--size", default="full", choices=["full", "small"], help="small: to try this script")
    option("--device", default="cuda:0")
    option("--dtype", default="bfloat16")
    option("--rounds", type=int, default=8, help="requests of each client")
    option("--prompt-tokens", type=int, default=2048, help="of ContinuousBatching")
    option("--no-http", action="store_true", help="measure in this process only")
    option("--record", type=Path, help="JSON file to write the results to")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "qwen.tiktoken"
        write_vocabulary(vocabulary)
        family = family_of(arguments.model, arguments.size, arguments.dtype, str(vocabulary))
        results = measure_engine(family, arguments)
        if not arguments.no_http:
            results["http"] = measure_server(arguments, vocabulary)
            if arguments.size == "full":  # otherwise it is another model
                add_shares(results["http"], results["raw"])
    if arguments.record:
        record(results, arguments, "bench_serve.py", NOTE)


if __name__ == "__main__":
    main()
