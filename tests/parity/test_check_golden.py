"""Every recorded value of the original comes out, or what `golden/deviations.json` says; the README's tables are those of the record."""

import json
import math
import shutil
from pathlib import Path

import check_golden
import pytest

from parity.result import Result, read, worst

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
RECORD = read(ROOT / "benchmarks" / "golden.json")
DEVIATIONS = read(GOLDEN / "deviations.json")
FILES = [path.relative_to(GOLDEN).as_posix() for path in check_golden.files(GOLDEN)[0]]


@pytest.mark.parametrize("file", FILES)
def test_what_the_original_gives_comes_out_but_for_stated_deviations(file):
    report = check_golden.check(GOLDEN / file, GOLDEN, DEVIATIONS.get(file, {}))
    assert report.missed == []
    recorded = next(entry for entry in RECORD["files"] if entry["file"] == file.removesuffix(".xz"))
    assert (report.compared, report.listed) == (recorded["cases"], recorded["differ_on_purpose"])


def test_no_file_is_missing_or_unknown():
    assert {file.removesuffix(".xz") for file in FILES} == {
        entry["file"] for entry in RECORD["files"]
    }
    assert check_golden.files(GOLDEN)[1] == []


def test_every_deviation_has_a_file_and_a_reason():
    assert DEVIATIONS.keys() <= set(FILES)
    assert all(case["why"] for cases in DEVIATIONS.values() for case in cases.values())


def test_the_copy_stays_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) <= 9_000_000


@pytest.mark.parametrize(
    "table",
    [check_golden.table(RECORD), check_golden.deviations_table(DEVIATIONS)],
    ids=["cases", "deviations"],
)
def test_the_readme_has_the_recorded_table(table):
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


# -- the comparison itself --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A part of the recorded files: four texts as lists, of which one differs on purpose."""
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(GOLDEN / "tokenizer" / "synthetic.tiktoken", tmp_path / "tokenizer")
    data = read(GOLDEN / "tokenizer" / "to_list_format_synthetic.json")
    agreeing = [case for case in data["cases"] if "ok" in case]
    data["cases"] = [
        *agreeing[:3],
        *(case for case in data["cases"] if case["text"] == "<ref>unclosed"),
    ]
    write(tmp_path, data)
    stated = {
        "<ref>unclosed": DEVIATIONS["tokenizer/to_list_format_synthetic.json"]["<ref>unclosed"]
    }
    (tmp_path / "deviations.json").write_text(
        json.dumps({"tokenizer/to_list_format_synthetic.json": stated})
    )
    return tmp_path


def write(folder: Path, data: dict) -> None:
    (folder / "tokenizer" / "to_list_format_synthetic.json").write_text(json.dumps(data))


def restate(folder: Path, change) -> None:
    listed = read(folder / "deviations.json")
    change(listed["tokenizer/to_list_format_synthetic.json"])
    (folder / "deviations.json").write_text(json.dumps(listed))


def test_any_part_of_a_folder_is_compared_and_counted(folder, capsys):
    assert check_golden.main(folder) == 0
    first, total = capsys.readouterr().out.splitlines()
    assert (
        first
        == "ok   tokenizer/to_list_format_synthetic.json: 3 of 4 cases agree, 1 differ on purpose; parts exact"
    )
    assert total == "1 files, 4 cases: 3 agree, 1 differ on purpose, 0 wrong"


def test_another_value_is_a_miss_and_named(folder, capsys):
    data = read(folder / "tokenizer" / "to_list_format_synthetic.json")
    case = next(case for case in data["cases"] if "ok" in case)
    case["ok"] = [{"text": "something else"}]
    write(folder, data)
    assert check_golden.main(folder) == 1
    assert f"{case['text']}: other parts; ours [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda listed: listed.clear(), "<ref>unclosed: other parts"),
        (
            lambda listed: listed["<ref>unclosed"].update(ours=[]),
            "<ref>unclosed: differs, but not as listed",
        ),
        (
            lambda listed: listed.update(gone={"ours": 1, "why": "?"}),
            "gone: is listed as a deviation, but is no case",
        ),
    ],
)
def test_a_deviation_must_be_stated_exactly(folder, change, message, capsys):
    restate(folder, change)
    assert check_golden.main(folder) == 1
    assert message in capsys.readouterr().out


def test_a_deviation_that_is_none_any_more_is_a_miss(folder, capsys):
    agreeing = next(
        case["text"]
        for case in read(folder / "tokenizer" / "to_list_format_synthetic.json")["cases"]
        if "ok" in case
    )
    restate(folder, lambda listed: listed.update({agreeing: {"ours": [], "why": "?"}}))
    assert check_golden.main(folder) == 1
    assert f"{agreeing}: is listed as a deviation, but agrees" in capsys.readouterr().out


def test_a_case_that_is_not_compared_is_a_miss(folder, capsys):
    data = read(folder / "tokenizer" / "to_list_format_synthetic.json")
    data["cases"].append(data["cases"][0])
    write(folder, data)
    assert check_golden.main(folder) > 0
    assert "4 cases were compared, but there are 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer/to_list_format_synthetic.json",
            '{"cases": [',
            "to_list_format_synthetic.json is no JSON",
        ),
        (
            "tokenizer/to_list_format_synthetic.json",
            '{"cases": [{}]}',
            "cannot be compared: KeyError: 'text'",
        ),
        (
            "tokenizer/to_list_format_synthetic.json",
            '{"vocab_sha256": "0"}',
            "was made with another synthetic.tiktoken",
        ),
        (
            "model/rotary.safetensors",
            "half a file",
            "rotary.safetensors cannot be read as safetensors",
        ),
        (
            "model/preprocess.json",
            '{"images": [{"file": "images/gone.png"}]}',
            "cannot be compared: FileNotFoundError",
        ),
        ("model/notes.json", "{}", "model/notes.json: no comparison knows this file"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_miss(folder, name, content, message, capsys):
    (folder / "model").mkdir()
    (folder / "deviations.json").write_text("{}")
    shutil.copy(GOLDEN / "model" / "ntk_alpha.json", folder / "model")
    if name.startswith("model"):
        (folder / "tokenizer" / "to_list_format_synthetic.json").unlink()
    (folder / name).write_text(content)
    assert check_golden.main(folder) == 1
    printed = capsys.readouterr().out
    assert message in printed
    assert (
        "ok   model/ntk_alpha.json: 70 of 70 cases agree" in printed
    )  # the others are compared all the same


def test_an_empty_folder_is_a_miss(tmp_path):
    assert check_golden.main(tmp_path) == 1


def test_a_nan_is_a_miss():
    assert math.isnan(worst([0.0, float("nan"), 1.0]))
    assert not Result(case="case", of="loss", deviation=float("nan"), allowed=1.0).passed


def test_a_record_is_written_only_of_a_whole_success(folder, tmp_path):
    written = tmp_path / "record.json"
    assert check_golden.main(folder, written=written) == 0
    assert read(written)["files"][0]["cases"] == 4
    assert str(tmp_path.parent) not in written.read_text()
    written.unlink()
    restate(folder, dict.clear)
    assert check_golden.main(folder, written=written) == 1
    assert not written.exists()
