"""A mistake on the command line gets one short message; help and lists say what there is."""

import subprocess
import sys
import time

import pytest
import torch


def run(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    command, *rest = arguments
    return subprocess.run(
        [sys.executable, "-m", f"qwenvl_lit.{command}", *rest],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "trainer.max_setps=3"], "did you mean trainer.max_steps"),
        (
            ["test", "model=qwen_vl_chat", "answered=mine"],
            "no key 'answered'; it is a key of predict",
        ),
        (["train", "modle=qwen_vl_chat"], "did you mean model?"),
        (["train", "model=qwen_vl_cat"], "qwen_vl_chat"),
        (["train", "data=cocco"], "Available options in 'data': chartqa, coco_en, "),
        (["train", "model.template=chatlm"], "chatlm"),
        (["train", "x y z"], "x y z"),
        (["train", "-m", "hydra/launcher=slurm", "seed=1,2"], "pip install 'qwenvl_lit[cluster]'"),
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
        (["test", "ckpt=latest"], "train first"),
    ],
)
def test_a_mistake_gets_a_short_message_without_traceback(arguments, says, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 15


@pytest.mark.parametrize(
    ("arguments", "says"),
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
def test_a_command_that_is_refused_leaves_no_run_folder(arguments, says, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "outputs").glob("*/*")) == []


def test_a_refused_command_leaves_other_files_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    run("predict", "model=qwen_vl_tiny", "image=a.png", "hydra.run.dir=mine", cwd=tmp_path)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    result = run("train", "hydra.run.dir=/dev/null/run", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: /dev/null/run cannot be written: Not a directory.")


def test_no_command_overwrites_a_run(tmp_path):
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "mine/checkpoints/last.ckpt").write_text("weeks")
    for command, *arguments in (["train"], ["predict", "model=qwen_vl_tiny"]):
        result = run(command, *arguments, "hydra.run.dir=mine", cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith(
            "error: hydra.run.dir=mine holds an earlier run (checkpoints/last.ckpt)"
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "checkpoints", "last.ckpt"]


def test_help_ends_quietly_when_its_pipe_is_closed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "qwenvl_lit.train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_the_package_lists_its_commands(tmp_path):
    command = [sys.executable, "-m", "qwenvl_lit"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith(
        "python -m qwenvl_lit.train    Fine-tune a model on a dataset.\n"
    )
    result = subprocess.run([*command, "train"], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (
        1,
        "error: there is no command 'train' here; a dot comes before it, as above\n",
    )


def test_help_begins_with_the_keys_of_the_command_and_their_comments(tmp_path):
    for command, key in (
        ("chat", "multiline: false  # true: a question"),
        ("export", "out: null  # the folder to write"),
    ):
        text = run(command, "--help", cwd=tmp_path).stdout
        assert text.index(key) < text.index("Groups and their choices"), command


@pytest.mark.parametrize("command", ["train", "test", "predict"])
def test_help_lists_groups_and_choices_within_three_seconds(command, tmp_path):
    start = time.perf_counter()
    result = run(command, "--help", cwd=tmp_path)
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    assert "model: qwen_vl, qwen_vl_chat, qwen_vl_tiny" in result.stdout
    assert seconds < 3
