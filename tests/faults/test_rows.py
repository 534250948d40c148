"""Malformed rows of every layout: read as an independent reader reads them, or refused."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from faults import simple_reader
from faults.simple_reader import LAYOUTS, Rows
from faults.tally import Tally, sizes, tallied
from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import FileRows
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource

FORMATS = (".jsonl", ".json", ".csv", ".jsonl.gz")
FILE_ROWS = 60


def flat(conversation: Conversation) -> simple_reader.Conversation:
    """A conversation as the simple reader returns it."""
    turns = []
    for turn in conversation.turns:
        pieces: list[simple_reader.Piece] = []
        for part in turn.parts:
            match part:
                case str():
                    pieces.append(part)
                case ImageSource():
                    pieces.append(("image", Path(part.name).name))
                case GroundedObject():
                    if part.label is not None:
                        pieces.append(("label", part.label))
                    for box in part.boxes:
                        assert isinstance(box, Box)
                        pieces.append(("box", (box.x0, box.y0, box.x1, box.y1)))
        turns.append((turn.role, simple_reader.joined(pieces)))
    return turns


def write(file: Path, rows: list[dict]) -> None:
    """Writes rows in the format that the name of the file says."""
    if file.suffix == ".csv":
        names = list(rows[0])
        with file.open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(names)
            for row in rows:
                values = (row.get(name) for name in names)
                table.writerow(cell(value) for value in values)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = text.encode()
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def cell(value: object) -> object:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def check_message(file: Path, error: DataError) -> None:
    assert str(error).startswith(f"{file}:"), f"no file and line: {error}"
    assert len(str(error).splitlines()) == 1, f"several lines: {error}"


def compare(tally: Tally, file: Path, rows: list[dict], counts: dict[str, int]) -> None:
    """Reads rows with both readers; a csv file holds text only and is read for crashes alone."""
    opened = FileRows(file, ReadOptions())
    assert len(opened) == len(rows), f"{len(opened)} rows of {len(rows)}"
    for index, row in enumerate(rows):
        with tally.attempt(f"{file.name} row {index} {json.dumps(row)}"):
            try:
                ours = flat(opened[index])
            except DataError as error:
                check_message(file, error)
                counts["refused"] += 1
                continue
            try:
                theirs = simple_reader.read(row)
            except Exception:
                counts["read by the package alone"] += 1
                continue
            counts["read by both"] += 1
            if file.suffix != ".csv":
                assert ours == theirs, f"{ours} is not {theirs}"


@pytest.fixture
def folder(tmp_path):
    for name in simple_reader.IMAGES:
        Image.new("RGB", (640, 480)).save(tmp_path / name)
    return tmp_path


@sizes(short=300, full=10_500)
def test_rows_are_read_as_a_simple_reader_reads_them(folder, size):
    with tallied("malformed rows", "all layouts and formats") as tally:
        counts = {"read by both": 0, "read by the package alone": 0, "refused": 0}
        seed = 0
        while tally.tried < size:
            layout, suffix = LAYOUTS[seed % len(LAYOUTS)], FORMATS[seed % len(FORMATS)]
            draw = Rows(layout, seed)
            rows = [draw.row(), *(draw.spoiled() for _ in range(FILE_ROWS - 1))]
            file = folder / f"rows_{seed}{suffix}"
            write(file, rows)
            compare(tally, file, rows, counts)
            seed += 1
        tally.measured |= counts
        assert counts["read by both"] > size / 4, counts
