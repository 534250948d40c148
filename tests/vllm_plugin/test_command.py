"""`python -m qwenvl_lit.serve engine=vllm`, from a run and an adapter to SIGTERM."""

import json
import re
import shutil
import signal
import subprocess
import sys
from socket import socket

import pytest
from vllm_plugin.questions import messages_of

pytestmark = pytest.mark.vllm

KEY = "a-key-of-the-tests"
ROWS = 8
LONG = 300  # tokens of an answer during which the server is stopped
STOP_S = 120  # for the end of a server; it takes about 10 s


@pytest.fixture
def served(demo, adapters, tmp_path):
    """The process of a server, once it answers, and its address."""
    run = shutil.copytree(demo.run, tmp_path / "mine")
    keys = tmp_path / "keys.txt"
    keys.write_text(KEY)
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        *(f"ckpt={run}", "engine=vllm", f"adapters={{second: {adapters['second']}}}"),
        *(f"serve.port={port}", f"serve.keys={keys}", "generation.max_new_tokens=64"),
        "vllm.arguments=[--enforce-eager]",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "qwenvl_lit.serve", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(lines))
        yield process, f"http://127.0.0.1:{port}/v1", "".join(lines)
    finally:
        process.terminate()  # kill would leave the engine's processes
        process.communicate(timeout=STOP_S)


def test_a_run_and_an_adapter_are_served_until_sigterm(served, demo, answers, tmp_path):
    from openai import AuthenticationError, OpenAI

    process, url, log = served
    assert re.search(rf"^{re.escape(url)} for OpenAI clients", log, re.MULTILINE)
    assert KEY not in log
    settings = tmp_path / "mine/checkpoints/best_served/qwenvl_lit.json"
    assert json.loads(settings.read_text())["model"]["dtype"] == "float32"
    client = OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=600)
    assert {model.id for model in client.models.list()} == {"mine", "second"}

    def ask(row, model):
        completion = client.chat.completions.create(model=model, messages=messages_of(row))
        return completion.choices[0].message.content.strip()

    rows = demo.rows[:ROWS]
    assert [ask(row, "mine") for row in rows] == answers[:ROWS]
    assert [ask(row, "second") for row in rows] != answers[:ROWS]
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()

    # An answer that has begun is finished. vLLM may log an error of its engine afterwards.
    stream = client.chat.completions.create(
        model="mine",
        messages=messages_of(rows[0]),
        max_tokens=LONG,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(stream)
    process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.usage.completion_tokens == LONG
    rest = process.communicate(timeout=STOP_S)[0]
    assert process.returncode == 0, rest
