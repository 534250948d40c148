"""The file that lists what is wrong with rows."""

import json

import pytest

from qwenvl_lit.data.findings import FILENAME, FindingsLog, FindingsWriter
from qwenvl_lit.types import Dropped

NO_FINDING = [
    "5",
    "null",
    "[]",
    "{}",
    '{"set": "train"}',
    '{"set": {}, "kind": [], "message": null}',
    "[" * 100_000,
    '{"set": "tr',
    "",
]


@pytest.mark.parametrize("line", NO_FINDING, ids=lambda line: line[:20])
def test_a_resumed_run_lists_each_finding_once_beside_lines_that_are_none(tmp_path, line):
    dropped = [Dropped("too long").in_row("rows.jsonl:3", "c")]
    file = tmp_path / FILENAME
    writer = FindingsWriter(folder=tmp_path)
    FindingsLog(1.0).add_dropped("train", 9, dropped, writer)
    [finding] = file.read_text().splitlines()
    file.write_text(f"{finding}\n{line}\n")
    FindingsLog(1.0).add_dropped("train", 9, dropped, writer)
    assert file.read_text() == f"{finding}\n{line}\n"
    assert json.loads(finding)["id"] == "c"
