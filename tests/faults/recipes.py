"""Small runs of the demo, and the files that commands make of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from commands import output_of, read_json_lines
from scripted import tiny_checkpoint
from small_demo import small_demo

from qwenvl_lit.callbacks.run_log import read_log

# 30 optimizer steps, a validation at the half and at the end, a checkpoint after every third step
TRAIN = [
    *small_demo(),
    "data.train=[train_single.jsonl#16,train.jsonl#48]",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.generated_validation_rows=4",
    "trainer.max_steps=30",
    "trainer.validate_every=15",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every=3",
]
SHORTER = ["trainer.max_steps=4", "trainer.validate_every=2", "callbacks.checkpoint.every=1"]
LORA = ["adapter=lora", "adapter.rank=2", "adapter.targets=all-linear"]
LOGGED = ("step", "loss", "accuracy", "grad_norm", "learning_rate")  # and val/...


def train(folder: Path, *arguments: str, run: str = "run") -> Path:
    """Trains without interruption; returns the run folder."""
    output_of(folder, "train", *TRAIN, *arguments, f"hydra.run.dir={run}")
    return folder / run


def published_model(folder: Path) -> Path:
    """A tiny full model, `folder`/model."""
    return tiny_checkpoint(folder / "model")


def load(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=True)


def is_equal(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        same_type = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        return same_type and torch.equal(one, other)
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return False
        return all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        if not isinstance(other, list | tuple) or len(one) != len(other):
            return False
        return all(map(is_equal, one, other))
    return one == other


def file_names(folder: Path) -> set[str]:
    """Names of the files of a folder; a logger may have started a new version of its folder."""
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    names = {re.sub(r"/version_\d+/", "/version/", name) for name in names}
    return {name for name in names if not name.endswith((".log", ".lock"))}


def logged(run: Path) -> list[dict[str, Any]]:
    """The log of a run, without what depends on the speed of the machine."""
    records = []
    for record in read_log(run / "logging.jsonl"):
        is_kept = {name: name in LOGGED or name.startswith("val/") for name in record}
        records.append({name: value for name, value in record.items() if is_kept[name]})
    return records


def assert_same_run(run: Path, whole: Path) -> None:
    """Asserts that two runs ended with the same files, log, weights and optimizer states."""
    lost = sorted(file_names(whole) - file_names(run))
    assert not lost, f"files are missing: {lost}"
    for name in ("last", "best"):
        stored, expected = (load(folder / f"checkpoints/{name}.ckpt") for folder in (run, whole))
        for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            if key in expected:
                assert is_equal(stored[key], expected[key]), f"{name}.ckpt: {key} differs"
    assert str(logged(run)) == str(logged(whole)), "logging.jsonl differs"  # nan equals nan as text


def answers(folder: Path) -> list[dict[str, Any]]:
    return read_json_lines(folder / "predictions.jsonl")
