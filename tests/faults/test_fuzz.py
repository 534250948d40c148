"""Answers, token ids, text and command-line values that hypothesis draws."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from commands import compose_config
from faults.processes import fork_command
from faults.recipes import TRAIN
from faults.tally import Tally, sizes, tallied
from hydra.utils import instantiate
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_family

from qwenvl_lit.cli.command import COMPOSITION_ERRORS, prepare
from qwenvl_lit.cli.hints import explain
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.terminal import printable
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Turn

MARKUP = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<image>")
MARKUP += ("(1,2),(3,4)", "(999,0)", "(-1,1e9)", "<|im_end|>", "<|endoftext|>", "\x1b[2J", "\r")
MARKUP += ("\u2028", "\u0085", "\x00", "<script>", "A.", "dog", "12%", "1/0", "nan", "1e400")
LONG = {}  # below and above the limit on the text of a row
for characters in (499_000, 1_000_000):
    LONG[f"{characters:,} blanks"] = " " * characters
    LONG[f"{characters:,} letters"] = "a" * characters
# The tokenizer and the commands take text that UTF-8 can hold.
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ANSWERS = st.one_of(UNICODE, st.lists(st.sampled_from(MARKUP), max_size=12).map("".join))
HUGE = "99999999999999999999"
ODD = ("-1", "0", "nan", "1e400", HUGE, "abc")
STARTS_PROCESSES = ("data.num_workers", "trainer.devices")
NUMBERS = (*ODD, "inf", "-inf", "1.5", "true", "null", "[1]", "{a:1}", '""', "-0.0", "1_0", "0x10")
KEYS = ("seed", "optim.lr", "optim.weight_decay", "data.batch_size", "data.max_tokens")
KEYS += ("data.num_workers", "data.validation", "trainer.max_steps", "trainer.max_epochs")
KEYS += ("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.devices")
KEYS += ("callbacks.checkpoint.every", "callbacks.checkpoint.keep", "callbacks.checkpoint.monitor")
KEYS += ("generation.max_new_tokens", "generation.temperature", "generation.top_p", "memory.tokens")
KEYS += ("adapter.rank", "adapter.alpha", "adapter.dropout", "speed.vision_cache_gb", "data.seed")
KEYS += ("model.max_length", "trainer.log_every_n_steps", "trainer.validate_every")
FREE_TEXT_KEYS = ("prompt", "ckpt", "image")


def attempts_of(tally: Tally, strategy: st.SearchStrategy, count: int, check: Callable) -> None:
    """Calls `check` with `count` values; failures are counted, not shrunk."""

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        with tally.attempt(repr(value)[:200]):
            check(value)

    run()


def check_one_line(error: DataError) -> None:
    assert len(str(error).splitlines()) == 1, f"several lines: {error}"


@pytest.fixture(scope="module")
def metrics() -> dict:
    """Every metric that conf/metrics names."""
    built = {}
    for file in sorted(config_folder().glob("metrics/*.yaml")):
        config = compose_config("train", f"metrics={file.stem}").metrics
        for name, node in config.items():
            built[f"{file.stem}.{name}"] = instantiate(node, _convert_="all")
    return built


def row() -> Conversation:
    """A grounding row with references and the columns that metrics select by."""
    image = ImageSource(Image.new("RGB", (64, 48)))
    box = Box(x0=1, y0=2, x1=30, y1=40)
    answer = GroundedObject(label="dog", boxes=(box,))
    turns = (
        Turn(role="user", parts=(image, "What?")),
        Turn(role="assistant", parts=(answer,)),
    )
    columns = {"task": "caption", "question_id": "1"}
    references = ("dog", "a dog", "12")
    return Conversation(id="1", turns=turns, references=references, columns=columns)


@sizes(short=40, full=1_500)
def test_any_answer_is_parsed_and_scored(metrics, size):
    processor, conversation = tiny_family().processor(), row()

    def check(text: str) -> None:
        prediction = processor.read(text, conversation)
        assert prediction.text == text, f"changed to {prediction.text!r}"
        for name, metric in metrics.items():
            metric.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                metric.update([prediction])
                value = metric.compute()
            numbers = value.values() if isinstance(value, dict) else [value]
            assert not any(math.isinf(float(number)) for number in numbers), f"{name}: {value}"

    with tallied("fuzzed values", "answers, parsed and scored by every metric") as tally:
        attempts_of(tally, ANSWERS, size, check)


@sizes(short=100, full=5_000)
def test_any_text_survives_the_tokenizer(size):
    processor = tiny_family().processor()
    tokenizer = processor.tokenizer

    def check_text(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text), "text changed"
        assert not {*ids} & {tokenizer.im_end_id, tokenizer.im_start_id}, "text became markup"

    def check_ids(ids: list[int]) -> None:
        known = [token_id for token_id in ids if token_id < tokenizer.vocab_size]
        assert isinstance(tokenizer.decode(known), str)

    with tallied("fuzzed values", "text and ids, through the tokenizer") as tally:
        attempts_of(tally, st.one_of(UNICODE, ANSWERS), size, check_text)
        attempts_of(tally, st.lists(st.integers(0, 5000), max_size=30), size, check_ids)
        for name, text in LONG.items():
            turns = (Turn(role="user", parts=("a",)), Turn(role="assistant", parts=(text,)))
            with tally.attempt(name), suppress(DataError):
                processor.encode(Conversation(id="1", turns=turns))


@sizes(short=30, full=300)
def test_any_argument_composes_or_is_a_mistake(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)

    def check_free_text(value: tuple[str, str]) -> None:
        key, text = value
        try:
            line = prepare("predict", ["model=qwen_vl_tiny", f"{key}={text}"], run="needed")
            config = compose_config("predict", *line.arguments)
        except DataError as error:
            check_one_line(error)
        except COMPOSITION_ERRORS as error:
            explain("predict", [f"{key}={text}"], error)
        else:
            taken = config[key]
            assert not isinstance(taken, str) or taken == text.strip("'"), f"became {taken!r}"

    def check_number(value: tuple[str, str]) -> None:
        argument = "=".join(value)
        try:
            line = prepare("train", [argument], run="start")
            compose_config("train", *line.arguments)
        except DataError as error:
            check_one_line(error)
        except COMPOSITION_ERRORS as error:
            explain("train", [argument], error)

    texts = st.tuples(st.sampled_from(FREE_TEXT_KEYS), st.one_of(UNICODE, ANSWERS))
    numbers = st.tuples(st.sampled_from(KEYS), st.one_of(UNICODE, st.sampled_from(NUMBERS)))
    with tallied("fuzzed values", "arguments, composed by Hydra") as tally:
        attempts_of(tally, texts, size, check_free_text)
        attempts_of(tally, numbers, size, check_number)


@sizes(short=None, full=ODD)
def test_an_odd_number_is_refused_or_works(tmp_path, size):
    """Every numeric key with every odd value, through the whole command."""
    short = ["trainer.max_steps=2", "trainer.max_epochs=1", "trainer.validate_every=2"]
    with tallied("fuzzed values", "odd numbers, as arguments of train") as tally:
        for key in KEYS:
            for number in size:
                if key in STARTS_PROCESSES and number == HUGE:
                    continue  # a bench must not depend on the check that it is about
                argument = f"{key}={number}"
                adapter = ["adapter=lora"] if key.startswith("adapter.") else []
                line = ["train", *TRAIN, *short, *adapter, argument]
                with tally.attempt(argument):
                    finished = fork_command(tmp_path, *line, seconds=60)
                    finished.refuses_or_works()


@sizes(short=100, full=3_000)
def test_text_of_answers_never_controls_a_terminal(size):
    def check(text: str) -> None:
        shown = printable(text)
        kinds = {unicodedata.category(character) for character in shown}
        assert not kinds & {"Cc", "Cf", "Zl", "Zp"}, f"{shown!r} has control characters"
        assert len(shown.splitlines()) <= 1, f"{shown!r} has several lines"

    with tallied("fuzzed values", "text for a terminal") as tally:
        attempts_of(tally, ANSWERS, size, check)
