import json
from pathlib import Path

import pytest
from commands import (
    compose_config,
    only_run,
    read_json_lines,
    run_command,
    run_from_nothing,
)
from omegaconf import OmegaConf
from PIL import Image
from small_demo import small_demo

from qwenvl_lit import build, check
from qwenvl_lit.cli.early_checks import check_files
from qwenvl_lit.types import DataError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Rows of training and a test set, with two errors.

    mine.jsonl has forty good rows, a row with a broken image and a line that is not JSON.
    test.jsonl repeats the first row.
    """
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    lines = []
    for number in range(40):
        question = f"<img>red.png</img>{number}?"
        row = {"query": question, "response": str(number), "id": f"r{number}"}
        lines.append(json.dumps(row))
    broken = {"query": "<img>broken.png</img>What?", "response": "0", "id": "half"}
    lines += [json.dumps(broken), "{oops"]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text(lines[0])
    return tmp_path


def exit_status(tmp_path: Path, *arguments: str) -> int:
    """Runs the command in this process, with `tmp_path`/run as its run folder."""
    (tmp_path / "run").mkdir(exist_ok=True)
    config = compose_config("check", f"paths.run={tmp_path / 'run'}", "workers=1", *arguments)
    with pytest.raises(SystemExit) as exit_info:
        check.main(config)
    return exit_info.value.code


def findings(run: Path) -> list[dict]:
    return read_json_lines(run / "findings.jsonl")


def test_the_demo_has_no_errors(tmp_path, capsys):
    demo = small_demo(train=12, single=8, new_classes=4)
    assert exit_status(tmp_path, f"paths.cache={tmp_path}", *demo) == 0
    printed = capsys.readouterr().out
    for name in ("train", "validation", "test", "unseen_pairs"):
        assert f"{tmp_path}/demo/{name}.jsonl" in printed
    assert not findings(tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    assert "No errors." in page
    assert page.count('<section class="example">') == 10


def test_errors_are_listed_and_give_exit_status_1(folder):
    data = ["data=jsonl", "data.train=mine.jsonl", "data.validation=10", "data.test=test.jsonl"]
    process = run_command(folder, "check", *data)
    assert (process.returncode, process.stderr) == (1, "")
    run = only_run(folder, "check")
    errors = [finding for finding in findings(run) if finding["kind"] == "error"]
    assert len(errors) == 2
    for error in errors:
        assert f"{error['set']}: {error['message']}" in process.stdout
    rows = {(error["file"], error["line"], error["id"]) for error in errors}
    assert rows == {("mine.jsonl", 41, "half"), ("mine.jsonl", 42, None)}
    assert "train: mine.jsonl: 32 of its 42 rows, layout query" in process.stdout
    assert "validation: mine.jsonl: 10 of its 42 rows, layout query" in process.stdout
    assert "2 errors" in process.stdout
    assert "2 errors" in (run / "report.html").read_text()
    assert not (run / "split.json").exists()  # a run of training draws and stores its own


def test_the_validation_rows_are_those_that_training_holds_out(folder):
    good_rows = (folder / "mine.jsonl").read_text().splitlines()[:40]
    (folder / "good.jsonl").write_text("\n".join(good_rows))
    overrides = ["data=jsonl", f"data.train={folder}/good.jsonl", "data.validation=7"]
    config = compose_config("check", *overrides, f"paths.run={folder}")
    data = build.data(config, build.processor(config))
    training_sets, test_sets = data.sets()
    assert not (folder / "split.json").exists()
    data.setup("fit")
    held_out = [row.id for row in data.validation]
    assert [row.id for row in training_sets["validation"]] == held_out
    assert len(training_sets["validation"]) + len(training_sets["train"]) == 40
    assert not test_sets


def test_broken_images_that_training_drops_are_not_errors(folder, tmp_path):
    lines = (folder / "mine.jsonl").read_text().splitlines()
    (folder / "four.jsonl").write_text("\n".join([*lines[:3], lines[40]]))
    data = ["data=jsonl", f"data.train={folder}/four.jsonl", "data.validation=null"]
    assert exit_status(tmp_path, *data) == 1
    drop = [*data, "data.on_bad_image=drop"]
    assert exit_status(tmp_path, *drop) == 1  # one of four is more than the default fraction
    assert exit_status(tmp_path, *drop, "data.max_bad_fraction=0.25") == 0
    assert [finding["kind"] for finding in findings(tmp_path / "run")] == ["dropped"]


def test_a_file_of_one_row_is_checked(folder, tmp_path, caplog):
    [first, *_] = (folder / "mine.jsonl").read_text().splitlines()
    (folder / "one.jsonl").write_text(first)
    assert exit_status(tmp_path, "data=jsonl", f"data.train={folder}/one.jsonl") == 0
    [warning] = [text for text in caplog.messages if "data.validation" in text]
    assert warning.startswith("training would stop: data.validation=0.01 takes 1 of 1 row; leave")
    assert "data.validation=null" in warning


def test_missing_images_that_training_drops_are_counted_and_named(folder, tmp_path, capsys):
    lines = (folder / "mine.jsonl").read_text().splitlines()[:3]
    lines.append(json.dumps({"query": "<img>none.png</img>?", "response": "a", "id": "gone"}))
    (folder / "four.jsonl").write_text("\n".join(lines))
    data = ["data=jsonl", f"data.train={folder}/four.jsonl", "data.validation=null"]
    assert exit_status(tmp_path, *data) == 1
    capsys.readouterr()
    drop = [*data, "data.on_bad_image=drop", "data.max_bad_fraction=0.5"]
    assert exit_status(tmp_path, *drop) == 0
    printed = capsys.readouterr().out
    line = "train: data.on_bad_image=drop leaves out 1 of 4 rows for missing or broken images; data"
    assert f"{line}.max_bad_fraction=0.5 allows 2" in printed
    assert f"{folder}/four.jsonl:4: row 'gone'" in printed
    config = compose_config("check", *drop, f"paths.run={folder}")
    data = build.data(config, build.processor(config))
    data.setup("fit")
    assert sum(map(len, data.train)) == 3


def test_a_very_long_row_is_an_error_with_the_tiny_model_too(folder, tmp_path):
    (folder / "long.jsonl").write_text(json.dumps({"query": "a", "response": "b c " * 50_000}))
    data = ["data=jsonl", f"data.train={folder}/long.jsonl", "data.validation=null"]
    assert exit_status(tmp_path, *data) == 1
    [finding] = findings(tmp_path / "run")
    assert "tokens are more than model.max_length=2048; " in finding["message"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=jsonl", "data.train=none.jsonl"], "no file none.jsonl"),
        (["data=jsonl", "data.train=mine.jsonl", "data.validation=none.jsonl"], "no file none.j"),
        (["data=jsonl", "data.train=mine.jsonl", "data.test={a: no.csv}"], "no file no.csv"),
        (["data=jsonl", "data.train=red.png"], "red.png:1: not UTF-8"),
        (["data=jsonl", "data.train=mine.jsonl", "data.test=."], ". is a folder"),
    ],
)
def test_files_are_opened_before_anything_else(folder, monkeypatch, overrides, message):
    monkeypatch.chdir(folder)
    config = compose_config("check", f"paths.run={folder}", "paths.cache=cache", *overrides)
    with pytest.raises(DataError, match=message):
        check_files(config, check.SPLITS)
    dataset = OmegaConf.to_container(config.data, resolve=True)
    mixture = OmegaConf.create({"data": {"datasets": {"mine": dataset}}})
    with pytest.raises(DataError, match=message):
        check_files(mixture, check.SPLITS)


def test_files_that_a_dataset_prepares_are_not_opened_before(tmp_path):
    config = compose_config("check", f"paths.run={tmp_path}", f"paths.cache={tmp_path}")
    check_files(config, check.SPLITS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_missing_file_is_named_before_torch_is_imported(tmp_path, command):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    process = run_from_nothing(tmp_path, command, "data=jsonl", "data.train=none.jsonl")
    assert process.returncode == 1
    assert process.stderr.startswith("error: no file none.jsonl, relative to ")
    assert len(process.stderr.splitlines()) == 1


def test_the_help_has_the_keys_that_matter(tmp_path):
    process = run_command(tmp_path, "check", "--help", "data=jsonl")
    lines = process.stdout.splitlines()
    assert len(lines) < 60
    keys = {line.strip().partition(":")[0] for line in lines}
    assert keys >= {
        "workers",
        "train",
        "on_bad_image",
        "max_bad_fraction",
        "max_length",
        "too_long",
    }
    assert not keys & {"lr", "max_epochs", "max_new_tokens", "batch_size", "targets"}
    assert "${paths.cache}" in process.stdout


def test_without_any_file_there_is_nothing_to_check(tmp_path):
    config = compose_config("check", f"paths.run={tmp_path}", "data=jsonl")
    with pytest.raises(DataError, match=r"nothing to check: give data\.train"):
        check.main(config)
