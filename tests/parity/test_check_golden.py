"""Every recorded value of the original is reproduced, except those in `golden/deviations.json`."""

import json
import math
import shutil
from pathlib import Path

import check_golden
import pytest
from check_golden import Deviations

from parity import reasons
from parity.result import Result, read, worst

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
RECORD = read(ROOT / "benchmarks" / "golden.json")
DEVIATIONS = read(GOLDEN / "deviations.json")
FILES = [path.relative_to(GOLDEN).as_posix() for path in check_golden.files(GOLDEN)[0]]


@pytest.mark.parametrize("file", FILES)
def test_original_results_are_reproduced_except_listed_deviations(file):
    report = check_golden.check(GOLDEN / file, GOLDEN, Deviations(DEVIATIONS))
    assert report.missed == []
    recorded = next(entry for entry in RECORD["files"] if entry["file"] == file.removesuffix(".xz"))
    assert (report.compared, report.explained) == (recorded["cases"], recorded["differ_on_purpose"])


def test_no_file_is_missing_or_unknown():
    recorded = {entry["file"] for entry in RECORD["files"]}
    assert {file.removesuffix(".xz") for file in FILES} == recorded
    assert check_golden.files(GOLDEN)[1] == []


def test_every_deviation_has_a_file_and_a_reason():
    assert DEVIATIONS.keys() <= set(FILES)
    known = [value for name, value in vars(reasons).items() if name.isupper()]
    for cases in DEVIATIONS.values():
        assert all(case["why"] in known for case in cases.values())


def test_the_copy_stays_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) <= 9_000_000


def test_a_case_whose_name_is_not_text_is_reported(tmp_path):
    name = "chat/train_finetune_qwen.json"
    content = read(GOLDEN / name)
    content["cases"] = content["cases"][:2]
    content["cases"][1]["name"] = ["a", "list"]
    (tmp_path / "chat").mkdir()
    (tmp_path / name).write_text(json.dumps(content))
    report = check_golden.check(tmp_path / name, tmp_path, Deviations(DEVIATIONS, strict=False))
    [missed] = report.missed
    assert "cannot be compared" in missed
    assert "a case is named ['a', 'list'], expected text" in missed


@pytest.mark.parametrize(
    "table",
    [check_golden.table(RECORD), check_golden.deviations_table(DEVIATIONS)],
    ids=["cases", "deviations"],
)
def test_the_documentation_has_the_tables_of_the_record(table):
    assert table in (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")


# -- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", DEVIATIONS)
def test_rules_recognize_every_listed_deviation_by_its_reason(file):
    report = check_golden.check(GOLDEN / file, GOLDEN, Deviations({}, strict=False))
    assert report.missed == []
    differing = {result.case: result.reason for result in report.results if not result.passed}
    assert differing == {case: entry["why"] for case, entry in DEVIATIONS[file].items()}


def part_of_golden(folder: Path, file: str, change) -> Path:
    """Copies a recorded JSON file with its vocabulary, changed by `change(cases by name)`."""
    data = read(GOLDEN / file)
    cases = {case["name"]: case for case in data["cases"]}
    data["cases"] = change(cases)
    for name, text in {
        file: json.dumps(data),
        "tokenizer/synthetic.tiktoken": (GOLDEN / "tokenizer/synthetic.tiktoken").read_text(),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def renamed(case: dict, **changes) -> dict:
    return {**case, "name": "another name", **changes}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("chat/train_swift_synthetic.json", "special_in_text"),
        ("chat/train_swift_synthetic.json", "picture_prefix_in_query"),
        ("chat/train_swift_synthetic.json", "image_tag_in_response"),
        ("chat/train_finetune_synthetic.json", "assistant_first"),
        ("chat/train_finetune_synthetic.json", "max_len_40"),
        ("chat/make_context_synthetic.json", "history_none_response"),
    ],
)
def test_a_deviation_needs_no_entry_if_a_rule_derives_its_value(file, name, tmp_path, capsys):
    folder = part_of_golden(tmp_path, file, lambda cases: [renamed(cases[name])])
    assert check_golden.main(folder) == 0
    assert ": 0 agree, " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "name", "ids"),
    [
        ("chat/train_swift_synthetic.json", "special_in_text", "input_ids"),
        ("chat/train_swift_synthetic.json", "picture_prefix_in_query", "input_ids"),
        ("chat/train_finetune_synthetic.json", "max_len_40", "input_ids"),
        ("chat/make_context_synthetic.json", "history_none_response", "ids"),
    ],
)
def test_no_reason_hides_another_difference(file, name, ids, tmp_path, capsys):
    def change(cases: dict) -> list[dict]:
        values = list(cases[name][ids])
        values[-5] = 5 if values[-5] != 5 else 6
        return [renamed(cases[name], **{ids: values})]

    assert check_golden.main(part_of_golden(tmp_path, file, change)) == 1
    assert "another name: other ids" in capsys.readouterr().out


def answer(response: str, boxes, drawn) -> dict:
    history = [["Picture 1: <img>img/b.png</img>\nfind", "x"]]
    case = {"response": response, "history": history, "boxes": boxes, "drawn": drawn}
    return case | {"latest_picture": "img/b.png", "image_size": [333, 517]}


QUAD = "<quad>(1,2),(3,4),(5,6),(7,8)</quad>"
BOX = {"box": [100, 200, 300, 400]}
DRAWN = ["box", [33, 103, 99, 206]]
ANSWERS = {
    "a quadrilateral alone": answer(f"<ref>a</ref>{QUAD}", [], None),
    "a quadrilateral before a box": answer(
        f"<ref>a</ref>{QUAD}<box>(100,200),(300,400)</box>", [BOX], [DRAWN]
    ),
    "a quadrilateral after a box": answer(
        f"<ref>a</ref><box>(100,200),(300,400)</box>{QUAD}",
        [BOX | {"ref": "a"}],
        [DRAWN, ["text", "a", [33, 103]]],
    ),
    "a box that the original cannot read": answer(
        "<box>(1,2),(x,4)</box>", {"error": "ValueError", "message": ""}, None
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_with_quadrilaterals_or_unreadable_boxes_are_compared(name, tmp_path):
    data = {"image_sizes": {"img/b.png": [333, 517]}, "cases": [ANSWERS[name]]}
    file = tmp_path / "grounding" / "response_boxes.json"
    file.parent.mkdir()
    file.write_text(json.dumps(data))
    assert check_golden.main(tmp_path) == 0
    data["cases"][0]["boxes"] = [{"box": [0, 0, 0, 0]}]
    file.write_text(json.dumps(data))
    assert check_golden.main(tmp_path) == 1


# -- the comparison itself ------------------------------------------------------------------------

LISTS = "tokenizer/to_list_format_synthetic.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A part of the recorded files: four texts as lists, of which one differs on purpose."""
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(GOLDEN / "tokenizer" / "synthetic.tiktoken", tmp_path / "tokenizer")
    data = read(GOLDEN / LISTS)
    agreeing = [case for case in data["cases"] if "ok" in case]
    differing = [case for case in data["cases"] if case["text"] == "<ref>unclosed"]
    data["cases"] = agreeing[:3] + differing
    write(tmp_path, data)
    listed = {"<ref>unclosed": DEVIATIONS[LISTS]["<ref>unclosed"]}
    (tmp_path / "deviations.json").write_text(json.dumps({LISTS: listed}))
    return tmp_path


def write(folder: Path, data: dict) -> None:
    (folder / LISTS).write_text(json.dumps(data))


def change_list(folder: Path, change) -> None:
    listed = read(folder / "deviations.json")
    change(listed[LISTS])
    (folder / "deviations.json").write_text(json.dumps(listed))


def test_any_part_of_a_folder_is_compared_and_counted(folder, capsys):
    assert check_golden.main(folder) == 0
    first, total = capsys.readouterr().out.splitlines()
    assert first == f"ok   {LISTS}: 3 of 4 cases agree, 1 differ on purpose; parts exact"
    assert total == "1 files, 4 cases: 3 agree, 1 differ on purpose, 0 wrong"


def test_a_folder_without_a_list_is_compared_with_ours_and_by_rules(folder, capsys):
    (folder / "deviations.json").unlink()
    data = read(folder / LISTS)
    data["cases"].append({"text": "<box>(1,2),(3,", "error": "ValueError"})
    write(folder, data)
    assert check_golden.main(folder) == 0
    total = capsys.readouterr().out.splitlines()[-1]
    assert total == "1 files, 5 cases: 3 agree, 2 differ on purpose, 0 wrong"


def test_another_value_is_a_miss_and_named(folder, capsys):
    data = read(folder / LISTS)
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
def test_a_folder_with_its_own_list_must_state_deviations_exactly(folder, change, message, capsys):
    change_list(folder, change)
    assert check_golden.main(folder) == 1
    assert message in capsys.readouterr().out


def test_a_listed_deviation_that_agrees_is_a_miss(folder, capsys):
    cases = read(folder / LISTS)["cases"]
    agreeing = next(case["text"] for case in cases if "ok" in case)
    change_list(folder, lambda listed: listed.update({agreeing: {"ours": [], "why": "?"}}))
    assert check_golden.main(folder) == 1
    assert f"{agreeing}: is listed as a deviation, but agrees" in capsys.readouterr().out


def test_a_case_that_is_not_compared_is_a_miss(folder, capsys):
    data = read(folder / LISTS)
    data["cases"].append(data["cases"][0])
    write(folder, data)
    assert check_golden.main(folder) > 0
    assert "4 cases were compared, but there are 5" in capsys.readouterr().out


def test_cases_before_one_that_cannot_be_compared_are_counted(folder, capsys):
    data = read(folder / LISTS)
    data["cases"].append({"text": 7, "ok": []})
    write(folder, data)
    assert check_golden.main(folder) == 1
    printed = capsys.readouterr().out
    assert f"MISS {LISTS}: 3 of 5 cases agree, 1 differ on purpose" in printed
    assert "cannot be compared after <ref>unclosed: TypeError" in printed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (LISTS, '{"cases": [', "to_list_format_synthetic.json is no JSON"),
        (LISTS, '{"cases": [{}]}', "cannot be compared: KeyError: 'text'"),
        (LISTS, '{"vocab_sha256": "0"}', "was made with another synthetic.tiktoken"),
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
def test_an_unusable_file_is_a_miss_and_the_others_are_compared(
    folder, name, content, message, capsys
):
    (folder / "model").mkdir()
    (folder / "deviations.json").write_text("{}")
    shutil.copy(GOLDEN / "model" / "ntk_alpha.json", folder / "model")
    if name.startswith("model"):
        (folder / LISTS).unlink()
    (folder / name).write_text(content)
    assert check_golden.main(folder) == 1
    printed = capsys.readouterr().out
    assert message in printed
    assert "ok   model/ntk_alpha.json: 70 of 70 cases agree" in printed


def test_an_empty_folder_is_a_miss(tmp_path):
    assert check_golden.main(tmp_path) == 1


def test_a_nan_is_a_miss():
    assert math.isnan(worst([0.0, float("nan"), 1.0]))
    assert not Result(case="case", of="loss", deviation=float("nan"), allowed=1.0).passed


def test_a_record_is_written_only_if_nothing_is_wrong(folder, tmp_path):
    written = tmp_path / "record.json"
    assert check_golden.main(folder, written=written) == 0
    assert read(written)["files"][0]["cases"] == 4
    assert str(tmp_path.parent) not in written.read_text()
    written.unlink()
    change_list(folder, dict.clear)
    assert check_golden.main(folder, written=written) == 1
    assert not written.exists()
