"""Commands that are killed at random moments and started again end as uninterrupted ones."""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.processes import Started
from faults.recipes import LORA, TRAIN, answers, assert_same_run, file_names, train
from faults.tally import Tally, sizes, tallied

MOST_KILLS_IN_A_ROW = 3
SECONDS_TO_STOP = 30  # after SIGTERM
SECONDS_TO_NOTICE = 60  # that the first process was killed
STOPPED = (0, 143, -signal.SIGTERM)  # exit status after SIGTERM; the last one, before it listens

Arguments = Callable[[Path], list[str]]
Compare = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Recipe:
    """A command that can be repeated until it is done."""

    arguments: Arguments  # of the next start in a folder
    compare: Compare  # asserts that two folders hold the same results
    prepare: Callable[[Path], None] = lambda folder: None  # what the folder holds before


def training(*arguments: str) -> Recipe:
    """`resume=auto` starts the run, or resumes it if it has a checkpoint."""
    line = ["train", *TRAIN, *arguments, "hydra.run.dir=run", "resume=auto"]
    return Recipe(
        arguments=lambda folder: line,
        compare=lambda folder, whole: assert_same_run(folder / "run", whole / "run"),
    )


def prediction_arguments(folder: Path) -> list[str]:
    """A prediction in a new folder, which takes over the newest answers there are."""
    folders = sorted(folder.glob("answers_*"))
    line = ["predict", "ckpt=trained", "data.test=train.jsonl", "data.eval_batch_size=1"]
    line.append(f"hydra.run.dir=answers_{len(folders):02}")
    for earlier in reversed(folders):
        if any(file.stat().st_size for file in earlier.glob("predictions*.jsonl")):
            return [*line, f"answered={earlier.name}"]
    return line


def assert_same_answers(folder: Path, whole: Path) -> None:
    given, expected = (answers(max(home.glob("answers_*"))) for home in (folder, whole))
    for row in (*given, *expected):
        row["images"] = [Path(image).name for image in row["images"]]
        row["prompt"] = row["prompt"].replace(str(folder), "").replace(str(whole), "")
    assert given == expected, "the answers differ"


def assert_same_export(folder: Path, whole: Path) -> None:
    one, other = folder / "exported", whole / "exported"
    names = file_names(other)
    assert file_names(one) == names, f"files differ: {sorted(file_names(one) ^ names)}"
    _, differing, unreadable = filecmp.cmpfiles(one, other, names - {"README.md"}, shallow=False)
    assert not differing + unreadable, f"files differ: {differing + unreadable}"


def assert_same_sweep(folder: Path, whole: Path) -> None:
    for job in ("0", "1"):
        assert_same_run(folder / "swept" / job, whole / "swept" / job)
    assert (folder / "swept/sweep.csv").exists(), "there is no sweep.csv"


def train_before(folder: Path) -> None:
    """A run to predict with or to export; trained once and copied."""
    source = folder.parent / "before"
    if not source.exists():
        source.mkdir()
        train(source, "trainer.max_steps=8", "trainer.validate_every=4", run="trained")
    shutil.copytree(source, folder, dirs_exist_ok=True)


SWEEP = [
    "optim.lr=1e-3,2e-3",
    "hydra.sweep.dir=swept",
    *("trainer.max_steps=8", "trainer.validate_every=4"),
]
RECIPES = {
    "train, full": training(),
    "train, full, 2 workers": training("data.num_workers=2"),
    "train, LoRA": training(*LORA),
    "train, LoRA, 2 workers": training(*LORA, "data.num_workers=2"),
    "train, ddp_cpu": training("strategy=ddp_cpu"),
    "train, vision cache": training(*LORA, "adapter.targets=attention", "speed.vision_cache=true"),
    "predict": Recipe(prediction_arguments, assert_same_answers, train_before),
    "export": Recipe(
        lambda folder: ["export", "ckpt=trained", "out=exported"], assert_same_export, train_before
    ),
    "sweep": Recipe(lambda folder: ["train", "-m", *TRAIN, *SWEEP], assert_same_sweep),
}
KILLS = {"train, full": 8, "train, ddp_cpu": 6, "predict": 6, "export": 6, "sweep": 6}


def kill_until(tally: Tally, recipe: Recipe, folder: Path, *, kills: int, seed: int) -> None:
    """Kills a command `kills` times, in chains that end with an uninterrupted start."""
    chance = random.Random(seed)
    whole = new_folder(folder / "whole", recipe)
    cpu_seconds = run_to_the_end(whole, recipe)
    chain = 0
    while tally.tried < kills and chain < 3 * kills:
        chain += 1
        home = new_folder(folder / f"chain_{chain}", recipe)
        moments: list[str] = []
        with tally.attempt(f"chain {chain}") as attempt:
            attempt.count = 0
            for _ in range(min(MOST_KILLS_IN_A_ROW, kills - tally.tried)):
                share = chance.random()
                number = chance.choice((signal.SIGKILL, signal.SIGTERM))
                to_group = number == signal.SIGTERM and chance.random() < 0.5
                moments.append(f"{number.name}{' to the group' * to_group} at {share:.2f}")
                attempt.count += 1
                if not kill_at(share * cpu_seconds, home, recipe, number, to_group):
                    attempt.count -= 1  # it was done before
                    moments.pop()
                    break
            if moments:
                finish(home, recipe, f"after {', '.join(moments)}")
                recipe.compare(home, whole)
        if tally.failed and tally.failed[-1].startswith(f"chain {chain}:"):
            tally.failed[-1] += f" ({', '.join(moments)})"
        shutil.rmtree(home)


def new_folder(folder: Path, recipe: Recipe) -> Path:
    folder.mkdir()
    recipe.prepare(folder)
    return folder


def run_to_the_end(folder: Path, recipe: Recipe) -> float:
    """Runs a command without interruption; returns the CPU seconds of its first process."""
    seconds = 0.0
    command, *arguments = recipe.arguments(folder)
    with Started(folder, command, *arguments) as started:
        while started.is_running:
            seconds = max(seconds, started.cpu_seconds())
            pause(started)
        assert started.process.returncode == 0, started.output[-3000:]
    return seconds


def pause(started: Started) -> None:
    """Waits for a moment, or until the process ends."""
    with suppress(subprocess.TimeoutExpired):
        started.process.wait(0.02)


def kill_at(
    cpu_seconds: float, folder: Path, recipe: Recipe, number: signal.Signals, to_group: bool
) -> bool:
    """Starts the command and kills it; returns whether it had not ended before."""
    command, *arguments = recipe.arguments(folder)
    with Started(folder, command, *arguments) as started:
        while started.is_running and started.cpu_seconds() < cpu_seconds:
            pause(started)
        if not started.is_running:
            assert_done(started, "a start that was not killed")
            return False
        if to_group:
            os.killpg(started.process.pid, number)
        else:
            started.process.send_signal(number)
        stopping = number == signal.SIGTERM
        limit = SECONDS_TO_STOP if stopping else SECONDS_TO_NOTICE
        left = started.wait_until_gone(limit)
        assert not left, f"{len(left)} processes are left {limit} s after {number.name}"
        status = started.process.returncode
        if stopping:
            assert "Traceback (most" not in started.output, (
                f"a traceback after {number.name}: {started.output.strip().splitlines()[-1]}"
            )
            lines = started.output.strip().splitlines()[-1:]
            assert status in STOPPED, f"exit status {status} after SIGTERM, last line {lines}"
        return True


def finish(folder: Path, recipe: Recipe, history: str) -> None:
    """Repeats the command until the end; an export that was complete is refused instead."""
    command, *arguments = recipe.arguments(folder)
    with Started(folder, command, *arguments) as started:
        try:
            started.process.wait(300)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the last start hangs {history}") from None
        if command == "export" and "exported exists" in started.output:
            return
        assert_done(started, history)


def assert_done(started: Started, history: str) -> None:
    lines = started.output.strip().splitlines() or [""]
    status = started.process.returncode
    assert status == 0, f"exit status {status} of the last start {history}: {lines[-1]}"
    left = started.wait_until_gone(SECONDS_TO_STOP)
    assert not left, f"{len(left)} processes are left after the end"


@sizes(short=None, full=6)
@pytest.mark.parametrize("name", RECIPES)
def test_a_command_that_is_killed_and_repeated_ends_as_an_uninterrupted_one(name, tmp_path, size):
    with tallied("killed at random moments", name) as tally:
        kills = KILLS.get(name, size)
        kill_until(tally, RECIPES[name], tmp_path, kills=kills, seed=len(name))
        assert tally.tried >= kills, f"only {tally.tried} kills before the end of the command"


def test_a_run_that_is_killed_twice_ends_as_an_uninterrupted_one(tmp_path):
    """The short form: SIGKILL in the middle, SIGTERM to the group later."""
    recipe = RECIPES["train, full"]
    whole, home = (new_folder(tmp_path / name, recipe) for name in ("whole", "killed"))
    cpu_seconds = run_to_the_end(whole, recipe)
    assert kill_at(0.7 * cpu_seconds, home, recipe, signal.SIGKILL, to_group=False)
    kill_at(0.7 * cpu_seconds, home, recipe, signal.SIGTERM, to_group=True)
    finish(home, recipe, "after SIGKILL and SIGTERM")
    recipe.compare(home, whole)
