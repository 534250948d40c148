"""Damaged files: one line and exit status 1 or 2, or no hindrance where the file is no need."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.damage import BINARY, REFUSED, TEXT
from faults.processes import fork_command
from faults.tally import sizes, tallied

QUESTION = ["image=images/train_00000.png", "prompt=What?"]
MORE_STEPS = "trainer.max_steps=6"
RESUME = [["train", "resume=run", MORE_STEPS]]
READ_RUN = [["predict", "ckpt=run"], ["export", "ckpt=run", "out=out"]]
READ_RUN += [["train", "ckpt=run", "data=jsonl", "data.train=rows.jsonl", "trainer=smoke"]]
READ_EXPORT = [["predict", "ckpt=exported", *QUESTION], ["chat", "ckpt=exported"]]
READ_ADAPTER = [["predict", "ckpt=adapter", *QUESTION], ["export", "ckpt=adapter", "out=out"]]
READ_MODEL = [["predict", "model=qwen_vl_chat", "model.path=model", *QUESTION]]
READ_ROWS = [["check", "data=jsonl", "data.train=rows.jsonl"]]
READ_ROWS += [["predict", "ckpt=run", "data.test=rows.jsonl"]]
READ_ANSWERS = [["test", "predictions=answers"], ["predict", "ckpt=run", "answered=answers"]]


@dataclass(frozen=True)
class Target:
    """A file, and the commands that read it."""

    file: str
    commands: list[list[str]]
    weights: bool = False  # a flipped bit must not pass
    needed: bool = True  # the command cannot do without the file


TARGETS = {
    "last.ckpt": Target("run/checkpoints/last.ckpt", RESUME, weights=True),
    "best.ckpt": Target("run/checkpoints/best.ckpt", READ_RUN, weights=True),
    "a checkpoint without its run": Target(
        "alone.ckpt", [["predict", "ckpt=alone.ckpt"]], weights=True
    ),
    "config.yaml of Hydra": Target("run/.hydra/config.yaml", [*RESUME, *READ_RUN]),
    "overrides.yaml of Hydra": Target("run/.hydra/overrides.yaml", RESUME, needed=False),
    "split.json": Target("run/split.json", [*RESUME, READ_RUN[0]], needed=False),
    "metrics.json": Target("run/metrics.json", RESUME, needed=False),
    "versions.json": Target("run/versions.json", RESUME, needed=False),
    "logging.jsonl": Target("run/logging.jsonl", RESUME, needed=False),
    "adapter weights": Target("adapter/adapter_model.safetensors", READ_ADAPTER, weights=True),
    "adapter_config.json": Target("adapter/adapter_config.json", READ_ADAPTER),
    "settings of an adapter": Target("adapter/qwenvl_lit.json", READ_ADAPTER),
    "adapter of a run": Target(
        "lora/checkpoints/best_adapter/adapter_model.safetensors",
        [["predict", "ckpt=lora/checkpoints/best_adapter"]],
        weights=True,
    ),
    "exported weights": Target(
        "exported/model-00001-of-00001.safetensors", READ_EXPORT, weights=True
    ),
    "exported index": Target("exported/model.safetensors.index.json", READ_EXPORT),
    "exported config.json": Target("exported/config.json", READ_EXPORT),
    "exported settings": Target("exported/qwenvl_lit.json", READ_EXPORT),
    "exported vocabulary": Target("exported/qwen.tiktoken", READ_EXPORT),
    "exported generation_config.json": Target(
        "exported/generation_config.json", READ_EXPORT, needed=False
    ),
    "weights of a published model": Target("model/model-00001-of-00001.safetensors", READ_MODEL),
    "config.json of a published model": Target("model/config.json", READ_MODEL),
    "rows": Target("rows.jsonl", READ_ROWS),
    "an image": Target("images/train_00001.png", READ_ROWS),
    "answers": Target("answers/predictions.jsonl", READ_ANSWERS, needed=False),
}
IN_SHORT = {"last.ckpt": ("truncated",), "metrics.json": ("a list",)}
IN_SHORT |= {"exported config.json": ("truncated",), "adapter_config.json": ("wrong types",)}


def damages_of(target: Target) -> dict:
    is_text = target.file.endswith((".json", ".jsonl", ".yaml"))
    return TEXT if is_text else BINARY


def must_refuse(target: Target, damage: str) -> bool:
    """Whether a command must refuse the damaged file; else it may also succeed."""
    if damage == "a flipped bit":
        return target.weights
    return target.needed and damage in REFUSED


def attempt(everything: Path, folder: Path, target: Target, damage: str, line: list[str]) -> None:
    """Damages the file in a copy of `everything`, and runs a command that reads it."""
    shutil.copytree(everything, folder)
    try:
        shutil.copyfile(folder / "run/checkpoints/last.ckpt", folder / "alone.ckpt")
        damages_of(target)[damage](folder / target.file)
        finished = fork_command(folder, *line)
        if line[0] == "check":  # its report holds what is wrong
            finished.has_no_traceback()
            assert finished.status in (0, 1, 2), f"exit status {finished.status}"
            assert finished.status or not must_refuse(target, damage), "it found nothing"
        elif must_refuse(target, damage):
            finished.refuses()
        else:
            finished.refuses_or_works()
        if not target.needed and target.file.endswith(("metrics.json", "versions.json")):
            assert finished.status == 0, f"it blocks the command: {finished.errors}"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", IN_SHORT)
def test_a_damaged_file_is_one_line(kind, everything, tmp_path):
    target = TARGETS[kind]
    for damage in IN_SHORT[kind]:
        attempt(everything, tmp_path / "home", target, damage, target.commands[0])


@sizes(short=None, full=1)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_file_damaged_in_every_way_is_one_line(kind, everything, tmp_path, size):
    target = TARGETS[kind]
    with tallied("damaged files", kind) as tally:
        for damage in damages_of(target):
            for line in target.commands:
                with tally.attempt(f"{damage}, {' '.join(line[:2])}"):
                    attempt(everything, tmp_path / "home", target, damage, line)
