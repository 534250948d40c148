import json
from io import StringIO
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from qwenvl_lit.data.inspection import File, Inspection, Overlap, SetFacts
from qwenvl_lit.data.survey import Finding
from qwenvl_lit.reports.data import (
    group,
    groups,
    histogram,
    percentiles,
    print_summary,
    write_findings,
)
from qwenvl_lit.terminal import printable
from qwenvl_lit.types import location_of


def finding(index: int, problem: str, kind="error", where="", **options) -> Finding:
    options = {"id": f"r{index}", **options}
    message = location_of(where, options["id"]) + problem
    return Finding(kind=kind, index=index, message=message, where=where, **options)


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
        "empty_answers": 0,
        "bad_images": 0,
        "findings": tuple(findings),
        "affected": affected,
    }
    return SetFacts(name=name, **{**defaults, **options})


def inspection(*sets: SetFacts, **options) -> Inspection:
    return Inspection(sets=sets, **{"overlaps": (), **options})


def printed(inspected: Inspection, width=80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    print_summary(inspected, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("problems", "expected"),
    [
        (["image /p/b.jpg does not exist"], "image /p/b.jpg does not exist"),
        (["image /p/b.jpg is broken", "image /q/c.jpg is broken"], "image … is broken"),
        (["Expecting ',' delimiter at column 7"] * 2, "Expecting ',' delimiter at column 7"),
        (
            [
                "turn 2 has 700 characters, more than 500",
                "turn 2 has 800 characters, more than 500",
            ],
            "turn 2 has … characters, more than 500",
        ),
        (["object 1 ('dog'): 3", "object 1 ('cat'): 4.5"], "object 1 (…): …"),
        (["the answer's length is 7", "the answer's length is 8"], "the answer's length is …"),
        (["got '…' and 1", "got 'a' and 2"], "got … and …"),
    ],
)
def test_a_group_shows_what_its_findings_have_in_common(problems, expected):
    [shared] = group([finding(n, problem) for n, problem in enumerate(problems)])
    assert (shared.problem, shared.count) == (expected, len(problems))


def test_a_group_names_the_first_two_rows():
    located = [
        finding(0, "3 boxes", where="a.jsonl:1"),
        finding(1, "4 boxes", where="a.jsonl:2", id="a.jsonl:2"),
        finding(2, "5 boxes", where="a.jsonl:3"),
    ]
    [shared] = group(located)
    assert shared.places == "a.jsonl:1: row 'r0', a.jsonl:2 and 1 more"
    assert shared.problem == "… boxes"
    assert group(located[2:])[0].places == "a.jsonl:3: row 'r2'"


def test_findings_are_grouped_over_all_sets():
    train = facts(findings=[finding(0, "3 boxes"), finding(1, "4 boxes"), finding(2, "not JSON")])
    test_findings = [finding(0, "5 boxes"), finding(1, "left out", kind="dropped")]
    inspected = inspection(train, facts("test", findings=test_findings))
    errors = [(each.problem, each.count) for each in groups(inspected, "error")]
    assert errors == [("… boxes", 3), ("not JSON", 1)]


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
    shown = printed(inspection(facts(lengths=(), usable=empty)))
    assert "Tokens per row of train\nno usable rows\n" in shown


def test_the_summary_has_figures_files_findings_and_overlaps(tmp_path):
    file = File(path=tmp_path / ("long" * 30) / "a.jsonl", layout="query", rows=1234, used=1200)
    findings = []
    for n in range(25):
        findings.append(finding(n, f"bad [bold]box {n}", where=f"a.jsonl:{n}", id="x"))
    findings.append(finding(30, "3000 tokens are too many", kind="dropped", where="a.jsonl:30"))
    overlap = Overlap(first="train", second="test", rows=3, images=1)
    train = facts(findings=findings, files=(file,))
    text = printed(inspection(train, facts("test"), overlaps=(overlap,)))
    # The path stays on one line in a narrow terminal.
    assert f"train: {file.path}: 1,200 of its 1,234 rows, layout query" in text
    assert "25 errors" in text
    assert "25  bad [bold]box …" in text
    assert "train: a.jsonl:19: row 'x': bad [bold]box 19" in text
    assert "a.jsonl:20:" not in text
    assert (
        "25  bad [bold]box …\n           a.jsonl:0: row 'x', a.jsonl:1: row 'x' and 23 more" in text
    )
    assert "1  3000 tokens are too many\n           a.jsonl:30: row 'r30'" in text
    assert "Reading a row ends at its first error, so a row may have more" in text
    assert (
        "train and test: 3 rows of test with the images and the question of a row of train; "
        "1 image in both"
    ) in text


def test_few_errors_are_listed_once():
    text = printed(inspection(facts(findings=[finding(n, f"bad box {n}") for n in range(3)])))
    assert text.count("bad box 1") == 1
    assert "One by one" not in text


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
    findings = [
        finding(0, "one\ntwo \ud800", where="d/a:b.json:7 (row 12)"),
        finding(3, "left out", kind="dropped", where="a.jsonl:4", id=""),
        finding(4, "an image is missing", where="captions.json"),
    ]
    inspected = inspection(facts(findings=findings), facts("test", findings=findings[:1]))
    write_findings(inspected, tmp_path / "f.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "set": "train",
        "kind": "error",
        "file": "d/a:b.json",
        "line": 7,
        "row": 12,
        "id": "r0",
        "message": "d/a:b.json:7 (row 12): row 'r0': one\ntwo \ud800",
    }
    places = [(line["file"], line["line"], line["row"], line["id"]) for line in lines[1:3]]
    assert places == [("a.jsonl", 4, None, None), ("captions.json", None, None, "r4")]
    assert [line["set"] for line in lines] == ["train", "train", "train", "test"]


def test_rows_that_on_bad_image_drops_are_counted():
    few = facts(rows=40, bad_images=1)
    line = "train: data.on_bad_image=drop leaves out 1 of 40 rows for missing or broken images; "
    assert line + "data.max_bad_fraction=0.05 allows 2" in printed(
        inspection(few, max_bad_fraction=0.05), width=200
    )
    many = printed(inspection(facts(rows=40, bad_images=3), max_bad_fraction=0.05), width=200)
    assert "would leave out 3 of 40 rows" in many
    assert "on_bad_image" not in printed(inspection(few), width=200)
    assert "on_bad_image" not in printed(inspection(facts(), max_bad_fraction=0.05), width=200)
