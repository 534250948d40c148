"""Any content of a file is read, or refused with its file and line: no other error is raised."""

import base64
import csv
import io
import json
import random
import re

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import FileRows
from qwenvl_lit.grounding import tags_from_object
from qwenvl_lit.types import Conversation, DataError, GroundedObject

ROWS = 100  # in each file that is written
FILES = {"lines": 120, "array": 40, "csv": 40}


def png():
    stream = io.BytesIO()
    Image.new("1", (64, 48)).save(stream, format="png")
    return stream.getvalue()


PNG = png()
DOG = {"caption": "the dog", "bbox": [1, 2, 30, 40], "bbox_type": "real", "image": 0}
VALID = [
    {
        "query": "<image>Find <ref-object>",
        "response": "<bbox>",
        "images": ["a.png"],
        "objects": [DOG],
    },
    {
        "query": "<img>a.png</img>Find <ref>it</ref>",
        "response": "<box>(1,2),(3,4)</box>",
        "history": [["a", "b"]],
        "system": "s",
        "id": 7,
    },
    {
        "query": "a",
        "images": ["a.png", "a.png"],
        "response": "<bbox>",
        "objects": json.dumps([["dog", [1, 2, 998, 999]]]),
    },
    {
        "id": "1",
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.png</img>\na"},
            {"from": "assistant", "value": "b"},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}],
            }
        ]
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "https://host.invalid/a.png"}}
                ],
            }
        ]
    },
    {
        "instruction": "a",
        "input": "b",
        "output": "<quad>(1,1),(9,1),(9,9),(1,9)</quad>",
        "image": "a.png",
    },
    {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
    {"image": "a.png", "question": "a", "answers": ["b", {"answer": "c"}]},
    {"text": f"<img>data:image/png;base64,{base64.b64encode(PNG).decode()}</img>a"},
]
TAGS = [
    "<img>",
    "</img>",
    "<image>",
    "<ref-object>",
    "<bbox>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
]
TAGS += ["(1,2),(3,4)", "(9,9),(1000,-1)", "a.png", "none.png"]
NUMBERS = st.one_of(
    st.integers(-2000, 2000),
    st.floats(),
    st.sampled_from([10**400, -(10**30), 1e308, 5e-324, 2**63, True, 0.1 + 0.2, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(TAGS), max_size=6).map("".join),
    st.sampled_from(
        [
            "\ud800",
            "\x00",
            "﻿",
            "\u2028",
            "🐶\u200d",
            "é",
            "狗" * 300,
            "https://[",
            "data:x;base64,AAAA",
            "/9j/" + "A" * 80,
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.lists(NUMBERS, min_size=4, max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*DOG, "from", "value", "type"]), inner, max_size=3),
    ),
    max_leaves=5,
)
KEYS = sorted({key for row in VALID for key in row} | {"id", "question_id", "answer", "x"})


def paths(value, path=()):
    """Paths to all values within `value`."""
    yield path
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


def changed(value, path, change):
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], change)
    return copy


class Spoiler:
    """Makes malformed rows of valid ones, with values that hypothesis found.

    Many rows come from one draw of hypothesis, because drawing is slow.
    """

    def __init__(self, seed, values, texts):
        self.rng, self.values, self.texts = random.Random(seed), values, texts
        self.first = self.rng.choice(VALID)  # most rows of a file are like it

    def row(self):
        """A valid row with one to three values replaced, dropped, added or, if text, garbled."""
        row = self.first if self.rng.random() < 0.9 else self.rng.choice(VALID)
        for _ in range(self.rng.randint(1, 3)):
            path = self.rng.choice(list(paths(row)))
            action = self.rng.choice(["replace", "drop", "add", "text"])
            if action == "add" or not path:
                row = {**row, self.rng.choice(KEYS): self.rng.choice(self.values)}
            elif action == "drop" and isinstance(path[-1], str):
                row = changed(
                    row,
                    path[:-1],
                    lambda inside, key=path[-1]: {k: v for k, v in inside.items() if k != key},
                )
            elif action == "text":
                text = self.rng.choice(self.texts)
                row = changed(
                    row,
                    path,
                    lambda value, text=text: (
                        self.garbled(value, text) if isinstance(value, str) else text
                    ),
                )
            else:
                row = changed(row, path, lambda _: self.rng.choice(self.values))
        return row

    def garbled(self, text, added):
        at = self.rng.randint(0, len(text))
        return text[:at] + added + text[at + self.rng.randint(0, 2) :]

    def line(self):
        """A row as JSON: most are intact, some truncated, nested deeply or with bytes replaced."""
        line = json.dumps(self.row(), ensure_ascii=self.rng.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
        at = self.rng.randint(0, len(line))
        match self.rng.choice(["intact"] * 7 + ["cut", "bytes", "deep"]):
            case "cut":
                line = line[:at]
            case "bytes":
                line = (
                    line[:at]
                    + self.rng.randbytes(self.rng.randint(0, 4))
                    + line[at + self.rng.randint(0, 3) :]
                )
            case "deep":
                depth = self.rng.choice([1, 400, 990, 20_000])
                line = line.replace(
                    b":",
                    b":"
                    + b"[" * depth
                    + b"]" * self.rng.choice([0, depth])
                    + b", " * self.rng.randint(0, 1),
                    1,
                )
        return line.replace(b"\n", b" ")

    def table(self, count):
        """Rows of one layout as csv, whose cells are text or JSON, some with a byte inserted."""
        stream = io.StringIO(newline="")
        writer = csv.writer(stream)
        writer.writerow(self.first)
        for _ in range(count):
            cells = [{**self.first, **self.row()}[key] for key in self.first]
            writer.writerow(
                [
                    cell if isinstance(cell, str) and self.rng.random() < 0.9 else json.dumps(cell)
                    for cell in cells
                ]
            )
        content = stream.getvalue().encode("utf-8", "surrogatepass")
        if self.rng.random() < 0.3:
            at = self.rng.randint(0, len(content))
            content = (
                content[:at] + self.rng.choice([b'"', b"\xff", b"\r", b",", b"\x00"]) + content[at:]
            )
        return content


SPOILERS = st.builds(
    Spoiler,
    st.integers(0, 2**64),
    st.lists(VALUES, min_size=8, max_size=8),
    st.lists(TEXTS, min_size=8, max_size=8),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "a.png").write_bytes(PNG)
    return folder


def check(file, read_options):
    """Reads all rows. Every error names the file and, once the file is open, a line."""
    try:
        rows = FileRows(file, read_options)
    except DataError as error:
        check_message(
            error, rf"{re.escape(str(file))}(:\d+( \(row \d+\))?: | is empty| has no rows)"
        )
        return
    for index in range(len(rows)):
        try:
            row = rows[index]
        except DataError as error:
            check_message(error, rf"{re.escape(str(file))}:\d+( \(row \d+\))?: ")
        else:
            use(row)


def check_message(error, beginning):
    assert re.match(beginning, str(error)), error
    assert len(str(error)) < 5000  # it does not repeat the row
    str(error).encode()  # it can be written to any log


def use(row: Conversation):
    """Uses a row as training does: it has turns, text that can be encoded, boxes to write."""
    assert row.turns
    for turn in row.turns:
        for part in turn.parts:
            if isinstance(part, str):
                part.encode()
            elif isinstance(part, GroundedObject):
                list(tags_from_object(part, row.images))


# Examples are not shrunk: it would take minutes, and the message names the row.
LARGE = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
POLICIES = st.sampled_from(["error", "keep", "repair", "drop"])


@settings(LARGE, max_examples=FILES["lines"])
@given(spoiler=SPOILERS, on_bad_box=POLICIES)
def test_lines_are_read_or_refused(folder, spoiler, on_bad_box):
    file = folder / "rows.jsonl"
    file.write_bytes(
        b"\n".join([json.dumps(spoiler.first).encode(), *(spoiler.line() for _ in range(ROWS))])
    )
    check(file, ReadOptions(on_bad_box=on_bad_box, cache=folder, download=False))


@settings(LARGE, max_examples=FILES["array"])
@given(spoiler=SPOILERS, on_bad_box=POLICIES)
def test_arrays_are_read_or_refused(folder, spoiler, on_bad_box):
    file = folder / "rows.json"
    broken = spoiler.rng.random() < 0.5
    rows = [spoiler.line() if broken else json.dumps(spoiler.row()).encode() for _ in range(ROWS)]
    file.write_bytes(b"[" + b",\n".join([json.dumps(spoiler.first).encode(), *rows]) + b"]")
    check(file, ReadOptions(on_bad_box=on_bad_box, cache=folder, download=False))


@settings(LARGE, max_examples=FILES["csv"])
@given(spoiler=SPOILERS, on_bad_box=POLICIES)
def test_tables_are_read_or_refused(folder, spoiler, on_bad_box):
    file = folder / "rows.csv"
    file.write_bytes(spoiler.table(ROWS))
    check(file, ReadOptions(on_bad_box=on_bad_box, cache=folder, download=False))
