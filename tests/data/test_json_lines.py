import json

import pytest

from qwenvl_lit.data.findings import FindingsWriter, record
from qwenvl_lit.data.json_lines import append_json_lines, read_json_lines
from qwenvl_lit.data.predictions import answered_rows, prediction_rows
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.data.survey import Finding
from qwenvl_lit.types import DataError

# `str.splitlines` splits at all of these, a file of JSON lines at none.
SPLIT_CHARACTERS = ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r", "\n"]
GOOD = {"set": "a", "index": 0, "id": "x", "prediction": "yes"}


@pytest.mark.parametrize("character", [*SPLIT_CHARACTERS, "\udcff", "\x00", "\ufeff"])
def test_rows_come_back_whatever_characters_they_hold(character, tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    rows = [{"a": f"{character}b{character}"}, {f"c{character}": [character]}]
    for row in rows:
        append_json_lines(file, [row])
    assert list(read_json_lines(file)) == list(enumerate(rows, 1))
    assert file.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("character", [*SPLIT_CHARACTERS, "\udcff"])
def test_findings_are_one_line_each(character, tmp_path):
    finding = Finding(kind="note", index=0, id="a", message=f"row 'a{character}b'")
    FindingsWriter(folder=tmp_path).append([record("train", finding)] * 2)
    lines = (tmp_path / "findings.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [record("train", finding)] * 2


@pytest.mark.parametrize("character", SPLIT_CHARACTERS)
def test_predictions_are_read_from_what_was_written(character, tmp_path):
    rows = [GOOD | {"index": index, "prediction": f"a{character}b"} for index in range(2)]
    append_json_lines(tmp_path / "predictions.jsonl", rows)
    assert list(prediction_rows(tmp_path / "predictions.jsonl")) == rows
    assert answered_rows(tmp_path) == {"a": dict(enumerate(rows))}


@pytest.mark.parametrize("character", SPLIT_CHARACTERS)
def test_conversations_are_rows_of_a_dataset(character, tmp_path):
    row = {"query": f"a{character}b", "response": f"{character}c", "history": []}
    append_json_lines(tmp_path / "conversation.jsonl", [row, row])
    rows = read_rows(str(tmp_path / "conversation.jsonl"))
    assert [row.turns[0].parts for row in rows] == [(f"a{character}b",)] * 2


def test_a_line_without_its_end_is_left_out_if_the_process_may_have_been_killed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": "\xe7\x8b')
    assert list(read_json_lines(file, unfinished=True)) == [(1, {"a": 1})]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON: .*; is the file damaged\?"):
        list(read_json_lines(file))


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe",
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b"1" * 5000,
        b"\x00",
        b"[]",
        b"null",
        b"{}",
        json.dumps(GOOD | {"index": -1}).encode(),
        json.dumps(GOOD | {"index": True}).encode(),
        json.dumps(GOOD | {"index": 1e999}).encode(),
        json.dumps(GOOD | {"set": ["a"]}).encode(),
        json.dumps(GOOD | {"id": None}).encode(),
        json.dumps(GOOD | {"prediction": {}}).encode(),
        json.dumps({"x" * 10_000: "y" * 10_000}).encode(),
    ],
)
@pytest.mark.parametrize("unfinished", [True, False])
def test_a_damaged_prediction_is_one_line_with_file_and_line(line, unfinished, tmp_path):
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: ") as error:
        list(prediction_rows(file, unfinished=unfinished))
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for file in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot be read"):
            list(prediction_rows(file))
