import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from qwenvl_lit import build, check
from qwenvl_lit.cli.command import config_folder
from qwenvl_lit.types import DataError

SMALL = [
    "+data.prepare.train=12",
    "+data.prepare.single=8",
    "+data.prepare.validation=4",
    "+data.prepare.test=4",
]
SMALL += ["+data.prepare.unseen_pairs=2", "+data.prepare.new_classes=4"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Forty good rows, one of a broken image and one that is no JSON; a test set that repeats the first row."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    good = [
        {"query": f"<img>red.png</img>{n}?", "response": str(n), "id": f"r{n}"} for n in range(40)
    ]
    lines = [
        json.dumps(row)
        for row in [*good, {**good[0], "query": "<img>broken.png</img>What?", "id": "half"}]
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join([*lines, "{oops"]))
    (tmp_path / "test.jsonl").write_text(lines[0])
    return tmp_path


def status_of(tmp_path: Path, *arguments: str) -> int:
    """The exit status of the verb, run in this process; it writes into `tmp_path`/run."""
    (tmp_path / "run").mkdir(exist_ok=True)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("check", ["paths.run=" + str(tmp_path / "run"), "workers=1", *arguments])
    with pytest.raises(SystemExit) as ended:
        check.main(config)
    return ended.value.code


def findings(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "findings.jsonl").read_text().splitlines()]


def test_the_demo_has_no_errors(tmp_path, capsys):
    assert status_of(tmp_path, f"paths.cache={tmp_path}", *SMALL) == 0
    printed = capsys.readouterr().out
    for name in ("train", "validation", "test", "unseen_pairs"):
        assert f"{tmp_path}/demo/{name}.jsonl" in printed
    assert not findings(tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    assert "No errors." in page
    assert page.count('<section class="example">') == 10


def test_errors_are_listed_and_tell_in_the_exit_status(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "qwenvl_lit.check",
        "data=jsonl",
        "data.train=mine.jsonl",
        "data.validation=10",
        "data.test=test.jsonl",
    ]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    [run] = (folder / "outputs/check").iterdir()
    errors = [finding for finding in findings(run) if finding["kind"] == "error"]
    assert len(errors) == 2
    for finding in errors:
        assert f"{finding['set']}: {finding['message']}" in result.stdout
    assert {"mine.jsonl:41", "mine.jsonl:42"} == {
        Path(finding["message"].split(": ")[0]).name for finding in errors
    }
    assert "2 errors" in result.stdout
    assert "2 errors" in (run / "report.html").read_text()
    assert not (run / "split.json").exists()  # what training would draw is its own


def test_the_rows_that_training_holds_out_are_the_validation_rows(folder):
    (folder / "good.jsonl").write_text(
        "\n".join((folder / "mine.jsonl").read_text().splitlines()[:40])
    )
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(
            "check",
            [
                "data=jsonl",
                f"data.train={folder}/good.jsonl",
                "data.validation=7",
                f"paths.run={folder}",
            ],
        )
    data = build.data(config, build.processor(config))
    learned, tests = data.sets()
    assert not (folder / "split.json").exists()
    data.setup("fit")
    assert [row.id for row in learned["validation"]] == [row.id for row in data.validation]
    assert len(learned["validation"]) + len(learned["train"]) == 40
    assert not tests


def test_broken_images_that_training_drops_are_no_errors(folder, tmp_path):
    rows = (folder / "mine.jsonl").read_text().splitlines()
    (folder / "some.jsonl").write_text("\n".join([*rows[:3], rows[40]]))
    arguments = ["data=jsonl", f"data.train={folder}/some.jsonl", "data.validation=null"]
    assert status_of(tmp_path, *arguments) == 1
    assert status_of(tmp_path, *arguments, "data.on_bad_image=drop") == 1  # one of four is too many
    assert (
        status_of(tmp_path, *arguments, "data.on_bad_image=drop", "data.max_bad_fraction=0.25") == 0
    )
    assert [finding["kind"] for finding in findings(tmp_path / "run")] == ["dropped"]


def test_without_any_file_there_is_nothing_to_check(tmp_path):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("check", [f"paths.run={tmp_path}", "data=jsonl"])
    with pytest.raises(DataError, match=r"nothing to check: give data\.train"):
        check.main(config)
