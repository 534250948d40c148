"""Hostile text takes a time that is linear in its length, and too much of it is one line."""

import gc
import json
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qwenvl_lit.data.readers.question import conversation
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import FileRows
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.chat_processor import MAX_TEXT, NAMED_IMAGE
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import Conversation, DataError, Dropped, Turn
from tests.tiny import tiny_family

SMALL, LARGE = 20_000, 200_000  # characters
TOKENIZER = QwenTokenizer(TINY_VOCABULARY)
REPEATED = [
    "<img>",
    "<img><img>",
    "<image>",
    "<ref>",
    "<ref><ref></ref>",
    "<ref>a</ref>",
    "<box>",
    "<box>1,",
    "<box>(((((",
    "<box>" + " " * 95,
    "<quad>1,1,",
    "<box>(1,2),(3,4)</box>",
    "<box>(1,2),(3,4)</box><box>",
    "Picture 1: ",
    "Picture  ",
    "<",
    "(",
    "1",
    " ",
    "\r\n",
    "\u0301\u0323",  # combining marks that are not in their canonical order
    "\u2028",
]
ONCE = ["<img>", "<ref>", "<box>", "<box>1", "Picture", "Picture 1", "data:", "/9j/"]


def seconds(work, argument):
    """The least CPU time of three calls, without the collection of other tests' garbage."""
    times = []
    gc.disable()
    for _ in range(3):
        start = time.process_time()
        with suppress(DataError):
            work(argument)
        times.append(time.process_time() - start)
    gc.enable()
    return min(times)


def assert_linear(work, make):
    small, large = seconds(work, make(SMALL)), seconds(work, make(LARGE))
    # Quadratic work would take a hundred times as long.
    assert large < 40 * small + 0.1, f"{small:.3f} s, then {large:.3f} s for ten times the length"


READERS = {
    "objects": objects_from_tags,
    "objects of rows": lambda text: objects_from_tags(text, of_row=True),
    "question": lambda text: conversation(text, read_options=ReadOptions()),
    "named image": NAMED_IMAGE.search,
    "tokens": TOKENIZER.encode,
}


@pytest.mark.parametrize("reader", READERS)
def test_reading_markup_is_linear(reader):
    for text in REPEATED:
        assert_linear(READERS[reader], lambda size, text=text: (text * size)[:size])
    for start in ONCE:
        for rest in " 1x(":
            assert_linear(READERS[reader], lambda size, s=start, r=rest: s + r * size + "!")


BOX = {"caption": "x", "bbox": [1, 2, 3, 4], "bbox_type": "norm_1000"}


def pairs(size):
    return [[str(number), "b"] for number in range(size // 12)]


ROWS = {
    "text": lambda size: {"query": "<img>" * (size // 5), "response": "b"},
    "keys": lambda size: {"query": "a", **dict(pairs(size))},
    "unknown keys": lambda size: dict(pairs(size)),
    "history": lambda size: {"query": "a", "history": pairs(size)},
    "objects": lambda size: {"query": "<bbox>" * (size // 60), "objects": [BOX] * (size // 60)},
    "one object": lambda size: {
        "query": "<bbox>",
        "objects": [{**BOX, "bbox": [[1] * 4] * (size // 12)}],
    },
    "placeholders": lambda size: {"query": "<bbox>" * (size // 6)},
    "images": lambda size: {"query": "a", "images": ["none.png"] * (size // 12)},
    "base64": lambda size: {"query": "a", "image": "/9j/" + " " * size + "!"},
    "choices": lambda size: {"image": "a", "question": "b", "choices": ["c"] * size},
    "answers": lambda size: {"image": "a", "question": "b", "answers": ["c"] * size},
}
FILES = {
    "repeated key.jsonl": lambda size: (
        "{" + "".join(f'"{key}":1,' for key, _ in pairs(size)) + '"z":1,"z":1}'
    ),
    "nested.jsonl": lambda size: "[" * size,
    "nested row.jsonl": lambda size: '{"query":' + "[" * size,
    "open.jsonl": lambda size: '{"query":"' + "a" * size,
    "open.json": lambda size: '[{"query":"a"},{"query":"' + "a" * size,
    "blanks.json": lambda size: '[{"query":"a"}' + " " * size + "]",
    "blank lines.jsonl": lambda size: "\n" * size + '{"query":"a"}',
    "digits.jsonl": lambda size: '{"query":' + "1" * size + "}",
    "columns.csv": lambda size: ",".join(map(str, range(size // 6))) + "\na\n",
    "equal columns.csv": lambda size: "a," * (size // 2) + "\na\n",
    "quote.csv": lambda size: 'query\n"' + "a\n" * (size // 2),
    "quotes.csv": lambda size: "query\n" + '"' * size + "\n",
}
FILES |= {
    f"{name}.jsonl": lambda size, row=row: json.dumps(row(size)) for name, row in ROWS.items()
}


@pytest.mark.parametrize("name", FILES)
def test_reading_a_file_is_linear(name, tmp_path):
    def read(file):
        for on_bad_box in ("error", "keep"):
            message = ""
            try:
                FileRows(file, ReadOptions(on_bad_box=on_bad_box))[0]
            except DataError as error:
                message = str(error)
            assert len(message) < 2000
            assert "\n" not in message

    def write(size):
        file = tmp_path / str(size) / name
        file.parent.mkdir()
        file.write_text(FILES[name](size))
        return file

    assert_linear(read, write)


@pytest.mark.parametrize("content", [" ", "\u3000", "a", "1", "<img>", "e\u0301\u0323"])
@pytest.mark.parametrize("too_long", ["error", "drop", "truncate_left"])
def test_a_turn_with_too_much_text_is_one_line_with_file_line_and_id(content, too_long):
    text = content * (1_000_001 // len(content))
    row = Conversation(
        id="7",
        turns=(Turn(role="user", parts=(text,)), Turn(role="assistant", parts=("a",))),
        where="rows.jsonl:3",
    )
    processor = tiny_family(max_length=8, too_long=too_long).processor()
    message = rf"^rows\.jsonl:3: row '7': turn 1 has {len(text)} characters .* {MAX_TEXT}"
    with pytest.raises(Dropped if too_long == "drop" else DataError, match=message) as error:
        processor.encode(row)
    assert "\n" not in str(error.value)
    for prompt in (False, True):
        with pytest.raises(DataError, match=message):
            processor.length(row, prompt=prompt)


@pytest.mark.parametrize("content", [" ", "\t ", "\n", "1", "狗"])
def test_a_turn_at_the_limit_is_encoded(content):
    text = (content * MAX_TEXT)[:MAX_TEXT]
    turns = (Turn(role="user", parts=(text,)),)
    row = Conversation(id="1", turns=turns)
    assert tiny_family().processor().length(row, prompt=True).tokens > 100


def test_missing_files_of_images_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"query": "<img>" * 3 + "none.png</img>", "response": "a"}))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: row .*<img><img>none\.png does not exist"):
        FileRows(Path(file))[0]
