import json
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
    printable,
    reason,
    reasons,
    write_findings,
)


def error(index: int, message: str, kind="error") -> Finding:
    return Finding(kind=kind, index=index, id=f"r{index}", message=message)


def facts(name="train", findings=(), lengths=(10, 20, 30), **more) -> SetFacts:
    known = {
        "rows": 4,
        "files": (),
        "prompts": False,
        "lengths": np.array(lengths, dtype=np.int32),
        "supervised": np.array([1] * len(lengths), dtype=np.int32),
        "usable": np.arange(len(lengths)),
        "images": 2,
        "boxes": 1,
        "unanswered": 0,
        "findings": tuple(findings),
        "affected": {
            kind: sum(finding.kind == kind for finding in findings)
            for kind in ("error", "dropped", "note", "duplicate")
        },
    }
    return SetFacts(name=name, **{**known, **more})


def printed(inspection: Inspection, width=80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the process
    print_summary(inspection, console)
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
    ],
)
def test_a_reason_leaves_out_place_names_and_numbers(message, expected):
    assert reason(message) == expected


def test_reasons_are_counted_over_all_sets():
    train = facts(
        findings=[
            error(0, "a:1: row 'x': 3 boxes"),
            error(1, "a:2: row 'y': 4 boxes"),
            error(2, "a:3: not JSON"),
        ]
    )
    test = facts(
        "test", findings=[error(0, "b:1: row 'x': 5 boxes"), error(1, "left out", kind="dropped")]
    )
    assert reasons(Inspection(sets=(train, test), overlaps=()), "error") == [
        ("… boxes", 3),
        ("not JSON", 1),
    ]


@pytest.mark.parametrize("lengths", [[5], [0], [3, 3, 3], [1, 999], [40, 41, 129], [1, 10**6]])
def test_a_histogram_holds_every_length_once(lengths):
    intervals = histogram(np.array(lengths))
    assert sum(count for *_, count in intervals) == len(lengths)
    assert len(intervals) <= 12
    assert intervals[0][0] <= min(lengths) <= intervals[0][1]
    assert intervals[-1][0] <= max(lengths) <= intervals[-1][1]
    assert all(last + 1 == first for (_, last, _), (first, _, _) in pairwise(intervals))


def test_nothing_usable_has_no_histogram():
    assert histogram(np.array([], dtype=np.int32)) == []
    assert percentiles(np.array([], dtype=np.int32)) == (0, 0, 0)
    assert "train" in printed(
        Inspection(sets=(facts(lengths=(), usable=np.array([], dtype=int)),), overlaps=())
    )


def test_the_summary_says_what_there_is_and_what_is_wrong(tmp_path):
    file = File(path=tmp_path / ("long" * 30) / "a.jsonl", layout="query", rows=1234)
    findings = [error(n, f"a.jsonl:{n}: row 'x': bad [bold]box {n}") for n in range(25)]
    findings.append(error(30, "a.jsonl:30: row 'x': 3000 tokens are too many", kind="dropped"))
    overlap = Overlap(first="train", second="test", rows=3, images=2)
    text = printed(
        Inspection(
            sets=(facts(findings=findings, files=(file,)), facts("test")), overlaps=(overlap,)
        )
    )
    assert (
        f"train: {file.path}: 1,234 rows, layout query" in text
    )  # one line, however narrow the terminal is
    assert "25 errors" in text
    assert "25  bad [bold]box …" in text
    assert "train: a.jsonl:19: row 'x': bad [bold]box 19" in text
    assert "a.jsonl:20:" not in text
    assert "1  … tokens are too many" in text
    assert (
        "train and test: rows of test that ask the same of the same images: 3; images in both: 2"
        in text
    )


def test_many_sets_are_told_in_several_tables():
    text = printed(
        Inspection(sets=tuple(facts(f"set_{n}", rows=1000 + n) for n in range(9)), overlaps=())
    )
    for n in range(9):
        assert f" set_{n} " in text
        assert f" 1,00{n} " in text
    assert text.count("rows with errors") == 3


def test_text_of_the_data_cannot_steer_a_terminal():
    assert printable("a\x1b[2Jb\ud800ü漢\n") == "a\\x1b[2Jb\\ud800ü漢\\n"
    assert "\x1b[2J" not in printed(
        Inspection(sets=(facts(findings=[error(0, "a:1: \x1b[2J")]),), overlaps=())
    )


def test_every_finding_is_a_line_of_json(tmp_path):
    findings = [error(0, "one\ntwo \ud800"), error(3, "left out", kind="dropped")]
    write_findings(
        Inspection(
            sets=(facts(findings=findings), facts("test", findings=findings[:1])), overlaps=()
        ),
        tmp_path / "f.jsonl",
    )
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "set": "train",
        "kind": "error",
        "index": 0,
        "id": "r0",
        "message": "one\ntwo \ud800",
    }
    assert [line["set"] for line in lines] == ["train", "train", "test"]
