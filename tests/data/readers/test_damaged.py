"""Damaged files of every format are one line for `check` and at the start of `train`.

The short form of the suite damages each format 15 times. `DAMAGED_FILES=2000` sets the
number for the full form.
"""

import csv
import gzip
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.inspection import inspect
from qwenvl_lit.data.readers.coco import read_coco_captions
from qwenvl_lit.data.readers.refcoco import read_refcoco
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.data.readers.vqa import read_answered, read_vqa
from qwenvl_lit.types import DataError
from tests.tiny import tiny_family

DAMAGED_FILES = int(os.environ.get("DAMAGED_FILES", "15"))  # of each format
PROCESSOR = tiny_family().processor()
DOG = {"caption": "the dog", "bbox": [1, 2, 30, 40], "bbox_type": "real", "image": 0}
ROWS = {  # two rows of each layout
    "query": {
        "query": "<image>Find <ref-object>",
        "response": "<bbox>",
        "images": ["a.png"],
        "objects": [DOG],
        "history": [["a", "b"]],
        "system": "s",
        "id": 7,
    },
    "conversations": {
        "id": "1",
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.png</img>\na"},
            {"from": "assistant", "value": "<ref>b</ref><box>(1,2),(3,4)</box>"},
        ],
    },
    "messages": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}],
            },
            {"role": "assistant", "content": "b"},
        ]
    },
    "instruction": {"instruction": "a", "input": "b", "output": "c", "image": "a.png"},
    "conversation": {"conversation": [{"human": "a", "assistant": "b"}], "images": []},
    "vqa": {"image": "a.png", "question": "a", "answers": ["b", {"answer": "c"}], "question_id": 3},
    "choice": {"image": "a.png", "question": "a", "choices": ["b", "c"], "answer": 1, "hint": "d"},
    "referring": {"image": "a.png", "sent": "a", "bbox": [1, 2, 3.5, 4], "height": 9, "width": 9},
    "text": {"text": "a"},
    "response": {"response": "a"},
}
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}],
    "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
}
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"question_id": key, "image_id": 1, "question": "a"} for key in (1, 2)],
}
ANSWERS = {
    "annotations": [
        {"question_id": key, "answers": [{"answer": "a"}], "multiple_choice_answer": "a"}
        for key in (1, 2)
    ]
}
SENTENCES = [
    {
        "ann_id": 1,
        "image_id": 1,
        "split": "train",
        "sentences": [{"sent_id": key, "sent": "a"} for key in (1, 2)],
    }
]
INSTANCES = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"id": 1, "bbox": [1, 2, 3, 4]}],
}
ODD_VALUES = [
    *(None, True, False, 0, -1, 1.5, 10**30, 10**400, -(10**400), 1e308),
    *(
        "",
        "a",
        "²",
        "\u2028",
        "\x00",
        "\udcff",
        "\x1b[2J\r",
        "<img>",
        "</box>",
        "a.png\n",
        "💥" * 500,
    ),
    *([], {}, [[]], [None], [{}], {"a": 1}, ["a.png"], [[1, 2, 3, 4]], {"": {"": []}}),
]
ODD_JSON = [
    *(b"NaN", b"-Infinity", b"1" * 5000, b"1e999", b"[" * 50_000, b'{"a":' * 50_000),
    *(
        b'"\\ud800"',
        b'"\\',
        b"\x00",
        b"\xff",
        b"{}{}",
        b"]",
        b'{"a":1,"a":2}',
        b"//",
        b"'a'",
        b",,",
    ),
]
FILE_ENCODINGS = ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp500", "utf-7"]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows):
    return json.dumps(rows, indent=1).encode()


def as_csv(rows):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        cells = {}
        for key, value in row.items():
            cells[key] = value if isinstance(value, str) else json.dumps(value)
        writer.writerow(cells)
    return stream.getvalue().encode(errors="surrogatepass")


WRITERS = {"jsonl": as_lines, "json": as_array, "csv": as_csv}


class Format:
    """A dataset of some files: their content, and how a DataModule reads them.

    `source` is the file of rows within the folder; `write` gives the bytes of a file from its
    content.
    """

    def __init__(self, source: str, read: Callable, **files: tuple[str, object, Callable]):
        self.source = source
        self.read = read
        self.files = files


def dumps(content):
    return json.dumps(content).encode()


def protocol_2(content):
    return pickle.dumps(content, protocol=2)


FORMATS: dict[str, Format] = {}
for layout, row in ROWS.items():
    for kind, write in WRITERS.items():
        if kind == "csv" and layout in ("referring", "choice"):
            continue  # a cell is text, and these layouts need a list and a number
        name = f"rows.{kind}"
        FORMATS[f"{layout}.{kind}"] = Format(name, read_rows, rows=(name, [row, row], write))
FORMATS |= {
    "rows.jsonl.gz": Format(
        "rows.jsonl.gz",
        read_rows,
        rows=("rows.jsonl.gz", [ROWS["query"]] * 2, lambda rows: gzip.compress(as_lines(rows))),
    ),
    "coco": Format("coco.json", read_coco_captions, captions=("coco.json", COCO, dumps)),
    "flickr": Format(
        "coco.json",
        read_coco_captions,
        captions=("coco.json", {"annotations": [{"image": "a.png", "caption": "a"}] * 2}, dumps),
    ),
    "vqa": Format(
        "questions.json",
        partial(read_vqa, image="a.png"),
        questions=("questions.json", QUESTIONS, dumps),
        answers=("annotations.json", ANSWERS, dumps),
    ),
    "vqa by id": Format(
        "questions.json",
        partial(read_vqa, image="{image_id:01d}.png"),
        questions=("questions.json", QUESTIONS, dumps),
        answers=("annotations.json", ANSWERS, dumps),
    ),
    "answered": Format(
        "rows.jsonl",
        partial(read_answered, answers="answers.json"),
        rows=("rows.jsonl", [ROWS["vqa"] | {"question_id": key} for key in (1, 2)], as_lines),
        answers=("answers.json", ANSWERS, dumps),
    ),
    "refcoco": Format(
        "refs.p:train",
        partial(read_refcoco, images="."),
        sentences=("refs.p", SENTENCES, protocol_2),
        instances=("instances.json", INSTANCES, dumps),
    ),
}


def damaged_value(content, choice: random.Random):
    """Returns `content` with one value, somewhere in it, replaced, removed or renamed."""
    content = json.loads(json.dumps(content))
    node, path = content, []
    while isinstance(node, dict | list) and node and (not path or choice.random() < 0.8):
        key = choice.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append((node, key))
        node = node[key]
    if not path:
        return choice.choice(ODD_VALUES)
    parent, key = path[-1]
    match choice.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[choice.choice(["", "id", "image", "query", "\x1b"])] = parent.pop(key)
        case 2 if isinstance(parent, list):
            parent.append(choice.choice(ODD_VALUES))
        case _:
            parent[key] = choice.choice(ODD_VALUES)
    return content


def damaged_bytes(content: bytes, choice: random.Random) -> bytes:
    start, end = sorted(choice.choices(range(len(content) + 1), k=2))
    match choice.randrange(9):
        case 0:
            return content[:start]
        case 1:
            flipped = bytearray(content)
            for _ in range(choice.choice([1, 1, 5])):
                flipped[choice.randrange(len(flipped))] ^= 1 << choice.randrange(8)
            return bytes(flipped)
        case 2:
            return content[:start] + content[end:]
        case 3:
            return content[:end] + content[start:]
        case 4:
            return content[:start] + choice.choice(ODD_JSON) + content[start:]
        case 5:
            return content[:start] + choice.choice(ODD_JSON) + content[end:]
        case 6:
            with suppress(UnicodeError):
                return content.decode().encode(choice.choice(FILE_ENCODINGS), "replace")
            return content[::-1]
        case 7:
            return content.replace(b":", b": " + choice.choice(ODD_JSON) + b",", 1)
        case _:
            return choice.choice([b"", b"\x00" * 100, b" ", b"\n\n", b"\xef\xbb\xbf", b"[]", b"{}"])


def damaged_path(file: Path, choice: random.Random) -> None:
    """Replaces a file by something else with its name."""
    content = file.read_bytes()
    file.unlink()
    match choice.randrange(6):
        case 0:
            file.mkdir()
        case 1:
            os.mkfifo(file)
        case 2:
            file.symlink_to(file)
        case 3:
            file.symlink_to("/dev/zero")
        case 4:
            file.write_bytes(gzip.compress(content))
        case _:
            pass


def write_damaged(form: Format, folder: Path, seed: int) -> None:
    choice = random.Random(seed)
    victim = choice.choice(list(form.files))
    how = choice.choice(["value", "value", "value", "bytes", "bytes", "bytes", "path"])
    if seed == 0:
        how = ""  # sound files must be read
    for name, (file, content, write) in form.files.items():
        if how == "value" and name == victim:
            with suppress(TypeError, AttributeError, IndexError, KeyError):  # no csv of it
                (folder / file).write_bytes(write(damaged_value(content, choice)))
                continue
        written = write(content)
        if how == "bytes" and name == victim:
            written = damaged_bytes(written, choice)
        (folder / file).write_bytes(written)
        if how == "path" and name == victim:
            damaged_path(folder / file, choice)


def message_of(work: Callable[[], object]) -> str:
    try:
        work()
    except DataError as error:
        return str(error)
    return ""


def messages_of_check(data: DataModule) -> list[str]:
    messages = []

    def check():
        training, tests = data.sets()
        inspection = inspect({**training, **tests}, PROCESSOR, prompts=tests)
        messages.extend(finding.message for _, finding in inspection.errors)

    messages.append(message_of(check))
    return messages


def is_one_line(message: str, folder: Path) -> bool:
    """Returns whether a message is a line that names a file; "" is no message."""
    names_file = str(folder) in message or "findings.jsonl" in message
    return not message or (len(message) < 2500 and message.isprintable() and names_file)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_is_one_line(name, tmp_path):
    form = FORMATS[name]
    for seed in range(DAMAGED_FILES):
        folder = tmp_path / str(seed)
        folder.mkdir()
        Image.new("RGB", (64, 48)).save(folder / "a.png")
        Image.new("RGB", (64, 48)).save(folder / "1.png")
        write_damaged(form, folder, seed)
        options = {"read": form.read, "root": str(folder), "train": form.source}
        options["on_bad_box"] = ("error", "keep", "repair", "drop")[seed % 4]
        for cache in (None, str(folder / "cache")):
            data = DataModule(processor=PROCESSOR, cache=cache, **options)
            for message in messages_of_check(data):
                assert is_one_line(message, folder), f"seed {seed}: {message!r}"
                assert seed or not message
            first, *others = message_of(lambda data=data: data.setup("fit")).split("\n")
            listed = first.endswith("cannot be used:")  # and one line for each
            for message in others if listed else [first, *others]:
                assert is_one_line(message, folder), f"seed {seed}: {message!r}"
                assert seed or not message
