"""Messages and exit statuses of commands, and `--help`."""

import os
import re
import subprocess
import sys

import pytest
import torch
from commands import command_line, environment, run_command, run_from_nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "trainer.max_setps=3"], "did you mean trainer.max_steps"),
        (
            ["test", "model=qwen_vl_chat", "answered=mine"],
            "no key 'answered'; it is a key of predict",
        ),
        (["train", "modle=qwen_vl_chat"], "did you mean model?"),
        (["train", "model=qwen_vl_cat"], "qwen_vl_chat"),
        (
            ["train", "data=cocco"],
            "there is no data=cocco; did you mean data=refcoco? the choices are ",
        ),
        (["train", "model.template=chatlm"], "chatlm"),
        (["train", "x y z"], "x y z"),
        (["train", "-m", "hydra/launcher=slurm", "seed=1,2"], "pip install -e '.[cluster]'"),
        (["test"], "ckpt is missing"),
        (["predict"], "ckpt is missing"),
        (
            ["predict", "model=qwen_vl_tiny", "data=demo", "image=a.png", "prompt=Hi"],
            "image= with prompt= asks one question, and data=demo",
        ),
        (
            ["predict", "model=qwen_vl_tiny", "answered=mine", "prompt=Hi"],
            "prompt= asks one question, and answered='mine' is for the rows",
        ),
        (["test", "ckpt=nowhere"], "nowhere does not exist"),
        (["test", "ckpt=latest"], "to train one: python -m qwenvl_lit.train"),
    ],
)
def test_a_mistake_gets_a_short_message_without_a_traceback(arguments, message, tmp_path):
    process = run_command(tmp_path, *arguments)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert len(process.stderr.splitlines()) < 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "model=qwen_vl_tiny", "image=a.png"], "prompt is missing"),
        (
            ["export", "model=qwen_vl_tiny"],
            "out is missing: python -m qwenvl_lit.export ckpt=RUN out=FOLDER",
        ),
        (["train", "data.packing=true"], "say data.max_tokens=8192"),
        pytest.param(
            ["train", "strategy=ddp"],
            "there is no GPU: strategy=auto uses what there is; strategy=ddp_cpu",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
        ),
        (
            ["train", "speed.checkpointing=some"],
            "speed.checkpointing must be one of auto, none, full, got 'some'",
        ),
    ],
)
def test_a_refused_command_leaves_no_run_folder(arguments, message, tmp_path):
    process = run_command(tmp_path, *arguments)
    assert process.returncode in (1, 2)
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert list((tmp_path / "outputs").glob("*/*")) == []


@pytest.mark.parametrize(
    "arguments", [["speed.checkpointing=some"], ["trainer.max_setps=3"], ["--learning_rate", "1"]]
)
def test_a_mistake_on_the_command_line_is_found_before_torch_is_imported(arguments, tmp_path):
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qwenvl_lit.train", *arguments],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    lines = process.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "hydra" in modules
    assert not modules & {"torch", "lightning", "transformers"}


def test_a_refused_command_leaves_other_files_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    run_command(tmp_path, "predict", "model=qwen_vl_tiny", "image=a.png", "hydra.run.dir=mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    process = run_command(tmp_path, "train", "hydra.run.dir=/dev/null/run")
    assert process.returncode == 1
    assert process.stderr.startswith("error: /dev/null/run cannot be written: Not a directory; ")


def test_no_command_overwrites_a_run(tmp_path):
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "mine/checkpoints/last.ckpt").write_text("weeks")
    message = "error: hydra.run.dir=mine holds an earlier run (checkpoints/last.ckpt)"
    for command in (["train"], ["predict", "model=qwen_vl_tiny"]):
        process = run_command(tmp_path, *command, "hydra.run.dir=mine")
        assert process.returncode == 2
        assert process.stderr.startswith(message)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "checkpoints", "last.ckpt"]


def test_help_ends_quietly_when_its_pipe_is_closed(tmp_path):
    process = subprocess.Popen(
        command_line("train", "--help"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    with process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_help_begins_with_the_keys_of_the_command_and_their_comments(tmp_path):
    for command, key in (
        ("chat", "multiline: false  # true: a question"),
        ("export", "out: null  # the folder to write"),
    ):
        text = run_from_nothing(tmp_path, command, "--help").stdout
        assert text.index(key) < text.index("Groups and their choices"), command


@pytest.mark.parametrize("command", ["train", "test", "predict"])
def test_help_lists_groups_and_choices_within_three_seconds(command, tmp_path):
    start = os.times()
    process = run_from_nothing(tmp_path, command, "--help")
    end = os.times()
    seconds = (end.children_user - start.children_user) + (
        end.children_system - start.children_system
    )
    assert process.returncode == 0, process.stderr
    assert re.search(r"model: .*\bqwen_vl, qwen_vl_chat, qwen_vl_chat_int4", process.stdout)
    assert seconds < 3
