import json
from io import StringIO
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from qwenvl_lit.data.inspection import File, Inspection, Overlap, SetFacts
from qwenvl_lit.data.survey import Finding
from qwenvl_lit.reports.data import (
    histogram,
    percentiles,
    print_summary,
    reason,
    reasons,
    write_findings,
)
from qwenvl_lit.terminal import printable


def finding(index: int, message: str, kind="error") -> Finding:
    return Finding(kind=kind, index=index, id=f"r{index}", message=message)


def facts(name="train", findings=(), lengths=(10, 20, 30), **options) -> SetFacts:
    affected = dict.fromkeys(("error", "dropped", "note", "duplicate"), 0)
    for found in findings:
        affected[found.kind] += 1
    defaults = {
        "rows": 4,
        "files": (),
        "prompts": False,
        "lengths": np.array(lengths, dtype=np.int32),
        "supervised": np.ones(len(lengths), dtype=np.int32),
        "usable": np.arange(len(lengths)),
        "images": 2,
        "boxes": 1,
        "unanswered": 0,
        "findings": tuple(findings),
        "affected": affected,
    }
    return SetFacts(name=name, **{**defaults, **options})


def inspection(*sets: SetFacts, overlaps=()) -> Inspection:
    return Inspection(sets=sets, overlaps=overlaps)


def printed(inspected: Inspection, width=80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    print_summary(inspected, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/d/a.jsonl:12: row 'x': image /p/b c.jpg does not exist", "image … c.jpg does not exist"),
        ("/d/a.jsonl:7: not JSON: Expecting ',' delimiter", "not JSON: Expecting … delimiter"),
        (
            '/d/a.jsonl:7: sample "it\'s": 3000 tokens are more than max_length=2048',
            "… tokens are more than max_length=…",
        ),
        ("sample 'x': 3 tokens", "… tokens"),
        ("row 'a: row \\'b\\'': no turn", "no turn"),
        (
            "object 1 ('dog'): box ((3, -4.5), (1, 2)) is wrong",
            "object … (…): box ((…, …), (…, …)) is wrong",
        ),
        (
            "a:3: row 'x': is the last turn the assistant's, and is max_length above 7?",
            "is the last turn the assistant's, and is max_length above …?",
        ),
    ],
)
def test_a_reason_leaves_out_location_names_and_numbers(message, expected):
    assert reason(message) == expected


def test_reasons_are_counted_over_all_sets():
    train = facts(
        findings=[
            finding(0, "a:1: row 'x': 3 boxes"),
            finding(1, "a:2: row 'y': 4 boxes"),
            finding(2, "a:3: not JSON"),
        ]
    )
    test_findings = [finding(0, "b:1: row 'x': 5 boxes"), finding(1, "left out", kind="dropped")]
    inspected = inspection(train, facts("test", findings=test_findings))
    assert reasons(inspected, "error") == [("… boxes", 3), ("not JSON", 1)]


@pytest.mark.parametrize("lengths", [[5], [0], [3, 3, 3], [1, 999], [40, 41, 129], [1, 10**6]])
def test_a_histogram_counts_every_length_once(lengths):
    intervals = histogram(np.array(lengths))
    assert sum(count for *_, count in intervals) == len(lengths)
    assert len(intervals) <= 12
    assert intervals[0][0] <= min(lengths) <= intervals[0][1]
    assert intervals[-1][0] <= max(lengths) <= intervals[-1][1]
    assert all(last + 1 == first for (_, last, _), (first, _, _) in pairwise(intervals))


def test_a_set_without_usable_rows_has_no_histogram():
    empty = np.array([], dtype=np.int32)
    assert histogram(empty) == []
    assert percentiles(empty) == (0, 0, 0)
    assert "train" in printed(inspection(facts(lengths=(), usable=empty)))


def test_the_summary_has_figures_files_findings_and_overlaps(tmp_path):
    file = File(path=tmp_path / ("long" * 30) / "a.jsonl", layout="query", rows=1234)
    findings = [finding(n, f"a.jsonl:{n}: row 'x': bad [bold]box {n}") for n in range(25)]
    findings.append(finding(30, "a.jsonl:30: row 'x': 3000 tokens are too many", kind="dropped"))
    overlap = Overlap(first="train", second="test", rows=3, images=2)
    train = facts(findings=findings, files=(file,))
    text = printed(inspection(train, facts("test"), overlaps=(overlap,)))
    # The path stays on one line in a narrow terminal.
    assert f"train: {file.path}: 1,234 rows, layout query" in text
    assert "25 errors" in text
    assert "25  bad [bold]box …" in text
    assert "train: a.jsonl:19: row 'x': bad [bold]box 19" in text
    assert "a.jsonl:20:" not in text
    assert "1  … tokens are too many" in text
    assert (
        "train and test: 3 rows of test have the images and the question of a row of train; "
        "2 images are in both"
    ) in text


def test_many_sets_are_printed_in_several_tables():
    sets = [facts(f"set_{n}", rows=1000 + n) for n in range(9)]
    text = printed(inspection(*sets))
    for n in range(9):
        assert f" set_{n} " in text
        assert f" 1,00{n} " in text
    assert text.count("rows with errors") == 3


def test_control_characters_of_the_data_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\ud800ü漢\n") == "a\\x1b[2Jb\\ud800ü漢\\n"
    assert "\x1b[2J" not in printed(inspection(facts(findings=[finding(0, "a:1: \x1b[2J")])))


def test_every_finding_is_a_line_of_json(tmp_path):
    findings = [finding(0, "one\ntwo \ud800"), finding(3, "left out", kind="dropped")]
    inspected = inspection(facts(findings=findings), facts("test", findings=findings[:1]))
    write_findings(inspected, tmp_path / "f.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "set": "train",
        "kind": "error",
        "index": 0,
        "id": "r0",
        "message": "one\ntwo \ud800",
    }
    assert [line["set"] for line in lines] == ["train", "train", "test"]
