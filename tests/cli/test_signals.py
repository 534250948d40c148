"""Signals to the process group of a command, as terminals and clusters send them."""

import os
import signal
import time
from pathlib import Path

import pytest
from commands import run_command, start_command
from small_demo import small_demo

ANSWER = [
    *small_demo(train=2, single=2, test=24),
    "data=demo",
    "model=qwen_vl_tiny",
    "metrics=demo",
    "data.num_workers=1",
    "data.eval_batch_size=1",
    "hydra.run.dir=run",
]
SLOW = ["generation.max_new_tokens=300", "generation.min_new_tokens=300"]
FAST = ["generation.max_new_tokens=2"]


def stop(folder: Path, number: signal.Signals, command: str, *arguments: str, when) -> str:
    """Starts a command, signals its process group when `when` finds something; returns its line."""
    process = start_command(folder, command, *arguments, own_group=True)
    deadline = time.monotonic() + 100
    while not when() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    expected = {signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGTERM: 143}[number]
    assert process.returncode == expected, output
    assert "Traceback" not in output
    assert "Error executing job" not in output
    [line] = [line for line in output.splitlines() if line.startswith("Stopped")]
    return line


def has_answers(file: Path):
    return lambda: file.exists() and file.stat().st_size > 0


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_command_that_starts_ends_with_one_line_and_leaves_nothing(tmp_path, number, name):
    """The signal comes when the run folder was made, and torch is still being imported."""
    folder = tmp_path / "run"
    line = stop(tmp_path, number, "train", "hydra.run.dir=run", when=folder.exists)
    assert line == f"Stopped by {name}. Nothing was saved."
    assert not folder.exists()


def test_an_interrupted_test_starts_again_in_its_own_folder(tmp_path):
    file = tmp_path / "run/predictions.rank0.jsonl"
    line = stop(tmp_path, signal.SIGTERM, "test", *ANSWER, *SLOW, when=has_answers(file))
    assert line.startswith("Stopped by SIGTERM. The same command, also with hydra.run.dir=")
    (tmp_path / "run/predictions.rank1.jsonl").write_text("of another process\n")
    again = run_command(tmp_path, "test", *ANSWER, *FAST)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in file.parent.glob("predictions*")] == ["predictions.jsonl"]
    refused = run_command(tmp_path, "test", *ANSWER, *FAST)
    assert refused.returncode == 2
    assert "holds an earlier run" in refused.stderr


def test_an_interrupted_prediction_says_how_to_continue(tmp_path):
    file = tmp_path / "run/predictions.rank0.jsonl"
    line = stop(tmp_path, signal.SIGINT, "predict", *ANSWER, *SLOW, when=has_answers(file))
    folder = tmp_path / "run"
    advice = (
        f"The same command with answered={folder}, and another hydra.run.dir= if it has one, "
        f"answers the other rows."
    )
    assert line == f"Stopped by Ctrl-C. {advice}"
    refused = run_command(tmp_path, "predict", *ANSWER, *FAST)
    assert "holds an earlier run (predictions.rank0.jsonl)" in refused.stderr
