"""Test sets are checked before the model answers: no weights are loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import compose_config
from omegaconf import OmegaConf

from qwenvl_lit import build
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.data.download.hub import parse_address
from qwenvl_lit.evaluation import trained_rows
from qwenvl_lit.evaluation.sets import (
    EvaluationSet,
    earlier_runs,
    evaluation_sets,
    open_answered_sets,
)
from qwenvl_lit.evaluation.trained_rows import find_trained_rows
from qwenvl_lit.reports.scores_page import EarlierRun, comparison_rows
from qwenvl_lit.runs.run import Run
from qwenvl_lit.types import DataError

ROWS = [{"query": f"question {number}", "response": "yes"} for number in range(4)]


def write_rows(file: Path, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sets_of(*arguments: str) -> list[EvaluationSet]:
    """The evaluation sets of `test model=qwen_vl_tiny data=jsonl metrics=exact` and arguments."""
    given = ["model=qwen_vl_tiny", "data=jsonl", "metrics=exact", *arguments]
    line = prepare("test", given, run="needed")
    offer_groups(line)
    config = compose_config("test", *line.arguments)
    config.paths = {"run": "new", "cache": "cache"}
    return evaluation_sets(config, build.processor(config), [])


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        ({"set": "easy", "index": 0, "id": "rows.jsonl:1"}, "answers the sets easy, the data has"),
        ({"set": "mine", "index": 0, "id": "x"}, "row 0 of mine is 'x', which is 'rows.jsonl:1'"),
        ({"set": "mine", "index": 9, "id": "x"}, "row 9 of mine is 'x', which does not exist"),
        ({"set": "mine", "index": 0, "id": "rows.jsonl:1"}, None),
    ],
)
def test_answers_to_compare_with_are_matched_before_anything_is_answered(
    tmp_path, monkeypatch, answered, message
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "old").mkdir()
    write_rows(tmp_path / "old/predictions.jsonl", [{**answered, "prediction": "yes"}])
    arguments = ["data.test={mine: rows.jsonl}", "compare=[old]"]
    if message is None:
        assert len(sets_of(*arguments)) == 1
        return
    with pytest.raises(DataError, match=message):
        sets_of(*arguments)


def compared(tmp_path, answered: list[str], data: str) -> EarlierRun:
    """An earlier run with an answer to each of these sets, as `data` compares it."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "old").mkdir()
    row = {"index": 0, "id": "rows.jsonl:1", "prediction": "yes"}
    lines = [{**row, "set": name} for name in answered]
    write_rows(tmp_path / "old/predictions.jsonl", lines)
    sets = sets_of(data, "compare=[old]")
    [earlier] = earlier_runs(sets[0].config, sets, sets[0].data.processor)
    return earlier


@pytest.mark.parametrize(
    ("answered", "data", "common", "sentences"),
    [
        (["a", "b", "c"], "data.test={b: rows.jsonl}", {"b"}, ["Only old has answered a, c."]),
        (
            ["a"],
            "data.test={a: rows.jsonl, b: rows.jsonl}",
            {"a"},
            ["old has not answered b."],
        ),
    ],
)
def test_the_sets_that_both_runs_have_answered_are_compared(
    tmp_path, monkeypatch, answered, data, common, sentences
):
    monkeypatch.chdir(tmp_path)
    earlier = compared(tmp_path, answered, data)
    assert earlier.sets.keys() == common
    names = [name for name in ("a", "b") if f"{name}: " in data]
    now = [replace(earlier.sets[min(common)], name=name) for name in names]
    assert earlier.not_compared(now) == sentences
    [row] = comparison_rows(earlier, now)
    assert (row["metric"], row["before"], row["now"]) == ("exact_match", "1.000", "1.000")


def test_of_stored_answers_those_to_sets_of_the_data_are_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compared(tmp_path, ["a", "b"], "data.test={b: rows.jsonl}")
    file = tmp_path / "old/predictions.jsonl"
    [mine] = sets_of("data.test={b: rows.jsonl}")
    assert open_answered_sets(mine.data, file) == ["a"]
    assert mine.data.test_names == ["b"]
    [other] = sets_of("data.test={x: rows.jsonl}")
    with pytest.raises(DataError, match="answers the sets a, b, the data has x; choose the data="):
        open_answered_sets(other.data, file)


def trained_run(folder: Path, train, *, root=None, init=None) -> Run:
    """A run that was trained on these files; its weights are not there."""
    folder.mkdir()
    OmegaConf.save({"data": {"train": train, "root": root}}, folder / "config.yaml")
    checkpoint = folder / "checkpoints/best.ckpt"
    return Run(config={"init": init or {}}, checkpoint=checkpoint, folder=folder)


@pytest.mark.parametrize(
    ("train", "test", "warning"),
    [
        ("a.jsonl", "a.jsonl#2", "a.jsonl is a training file of the run"),
        (["new.jsonl", "a.jsonl#3"], "a.jsonl", "a.jsonl is a training file of the run"),
        ("*a.jsonl", "copy.jsonl", "copy.jsonl has the content of a.jsonl, a training file of"),
        ("a.jsonl", "{x: new.jsonl, y: part.jsonl}", "1 of the 2 rows of part.jsonl are in a.jso"),
        ("a.jsonl", "new.jsonl", None),
        ("moved.jsonl", "a.jsonl", None),
    ],
)
def test_test_rows_that_the_run_was_trained_on_are_warned_about(
    tmp_path, monkeypatch, train, test, warning
):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", ROWS[:3]), ("copy", ROWS[:3]), ("new", ROWS[3:]), ("part", ROWS[2:])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    found = find_trained_rows(sets_of(f"data.test={test}"), trained_run(tmp_path / "run", train))
    assert [text.startswith(warning) for text in found] == ([True] if warning else [])


@pytest.mark.parametrize(
    ("test", "warning"),
    [
        ("copy.parquet", "1 of the 2 rows of copy.parquet are in hub/train-1.parquet, a training"),
        ("hf://me/set:train#1", "hub/train-1.parquet is a training file of the run"),
        ("hf://me/set:test", None),
        ("new.parquet", None),
    ],
)
def test_rows_of_parquet_files_and_of_the_hub_are_compared(tmp_path, monkeypatch, test, warning):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    files = {"a": [b"a", b"b"], "copy": [b"b", b"c"], "new": [b"d"]}
    for name, images in {**files, "hub/train-1": files["a"], "hub/test-1": [b"e"]}.items():
        rows = [{"question": "q", "image": {"bytes": image, "path": "x"}} for image in images]
        if name == "copy":  # the order of columns is another, and so is the compression
            rows = [dict(reversed(row.items())) for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), f"{name}.parquet")
    asked = []

    def hub_files(address, download=True):
        asked.append((address, download))
        split = parse_address(address).split
        if split == "gone":
            raise DataError("not in the cache")
        return [Path(f"hub/{split}-1.parquet")]

    monkeypatch.setattr(trained_rows, "hub_files", hub_files)
    run = trained_run(tmp_path / "run", ["hf://me/set:train#100", "hf://me/set:gone"])
    found = find_trained_rows(sets_of(f"data.test='{test}'"), run)
    assert [text.startswith(warning) for text in found] == ([True] if warning else []), found
    assert {download for _, download in asked} == {False}


def test_training_files_are_those_of_the_runs_that_a_run_started_from_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    write_rows(tmp_path / "root/a.jsonl", ROWS)
    first = trained_run(tmp_path / "first", "a.jsonl", root=str(tmp_path / "root"))
    init = {"checkpoint": str(first.checkpoint), "init": {}}
    second = trained_run(tmp_path / "second", ["none.jsonl"], init=init)
    [warning] = find_trained_rows(sets_of("data.test=root/a.jsonl"), second)
    assert warning.startswith("root/a.jsonl is a training file of the run")
