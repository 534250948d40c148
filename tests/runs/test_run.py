import hashlib
import json
import os
import re

import pytest
import torch

from qwenvl_lit.runs.run import Run, contents, find_run, init_from
from qwenvl_lit.runs.versions import save_versions
from qwenvl_lit.types import DataError


def write_run(folder, *checkpoints: str):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text("model:\n  path: ${paths.cache}/x\n")
    (folder / "checkpoints").mkdir()
    for name in checkpoints:
        torch.save({"config": {"model": {"path": "stored"}}}, folder / "checkpoints" / name)
    return folder


def holding(folder, name: str):
    folder.mkdir()
    (folder / name).write_text("{}")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_folder_gives_its_best_checkpoint(tmp_path):
    run = find_run(str(write_run(tmp_path / "run", "last.ckpt", "best.ckpt")))
    assert run.checkpoint.name == "best.ckpt"
    assert run.config == {"model": {"path": "${paths.cache}/x"}}


def test_without_a_best_one_it_is_the_last(tmp_path):
    assert find_run(str(write_run(tmp_path / "run", "last.ckpt"))).checkpoint.name == "last.ckpt"


def test_a_checkpoint_file_knows_its_run(tmp_path):
    folder = write_run(tmp_path / "run", "last.ckpt", "best.ckpt")
    run = find_run(str(folder / "checkpoints/last.ckpt"))
    assert (run.checkpoint.name, run.folder) == ("last.ckpt", folder)


def test_a_checkpoint_file_alone_has_its_config_inside(tmp_path):
    file = tmp_path / "alone.ckpt"
    torch.save({"config": {"model": {"path": "stored"}}}, file)
    run = find_run(str(file))
    assert (run.config, run.folder) == ({"model": {"path": "stored"}}, None)


def test_latest_is_the_newest_run_with_a_checkpoint(tmp_path):
    for age, name, checkpoints in (
        (30, "old", ["best.ckpt"]),
        (20, "new", ["last.ckpt"]),
        (10, "unfinished", []),
    ):
        folder = write_run(tmp_path / "outputs/train" / name, *checkpoints)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert find_run("latest").folder.name == "new"
    with pytest.raises(DataError, match="the newest run here is outputs/train/new"):
        find_run("nowhere")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist; train one first"),
        (lambda path: path.mkdir(), "is not a run folder"),
        (lambda path: holding(path, "adapter_config.json"), "only LORA"),
        (lambda path: write_run(path), "stopped before it saved one"),
        (lambda path: path.write_text("hello"), "cannot be read as a checkpoint"),
        (lambda path: torch.save({"state_dict": {}}, path), "has no config"),
        (lambda path: torch.save([1], path), "cannot be read as a checkpoint"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, make, says):
    make(tmp_path / "thing")
    with pytest.raises(DataError, match=says):
        find_run(str(tmp_path / "thing"))


def test_what_a_run_learned_is_described_with_the_runs_before_it(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    adapter, base = {"_target_": "x.Full"}, {"checkpoint": "/first.ckpt"}
    run = Run(
        config={"adapter": adapter, "init": base}, checkpoint=tmp_path / "model.ckpt", folder=None
    )
    described = init_from(run)
    assert described.pop("sha256") == hashlib.sha256(b"weights").hexdigest()
    assert described == {
        "_target_": "qwenvl_lit.training.adapters.merging.StartingCheckpoint",
        "checkpoint": str(tmp_path / "model.ckpt"),
        "adapter": adapter,
        "init": base,
    }


def test_latest_without_runs_says_what_to_do():
    with pytest.raises(DataError, match="train first"):
        find_run("latest")


def test_versions_say_what_a_result_depends_on_and_whether_it_changed(tmp_path, caplog):
    save_versions(tmp_path)
    written = json.loads((tmp_path / "versions.json").read_text())
    assert written["torch"] == torch.__version__
    assert {
        "qwenvl_lit",
        "git",
        "python",
        "lightning",
        "transformers",
        "peft",
        "device",
        "command",
    } <= written.keys()
    assert re.fullmatch(r"[0-9a-f]{40}\+?", written["git"] or "0" * 40)
    assert not caplog.records
    (tmp_path / "versions.json").write_text(
        json.dumps({**written, "torch": "1.0", "command": "another"})
    )
    save_versions(tmp_path)
    [warning] = caplog.records
    assert f"torch 1.0 -> {torch.__version__}" in warning.getMessage()
    assert "command" not in warning.getMessage()


def test_contents_are_those_that_are_there(tmp_path):
    write_run(tmp_path / "run", "last.ckpt")
    (tmp_path / "run/curves").mkdir()
    assert [line.split()[0] for line in contents(tmp_path / "run").splitlines()] == [
        "checkpoints/last.ckpt",
        "curves",
    ]
