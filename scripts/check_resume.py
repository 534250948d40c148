"""Compares a resumed run with an uninterrupted one, on the device that training uses.

    python scripts/check_resume.py --work FOLDER                # the default recipe, full size
    python scripts/check_resume.py --work FOLDER --record benchmarks/resume.json speed=compiled
    python scripts/check_resume.py --work FOLDER --size small   # on a CPU, in a minute

Three runs of the same command: two from start to end, and one that resumes from the checkpoint in
the middle. Prints the largest differences of losses and of trained tensors, between the two
uninterrupted runs and between the first and the resumed one. Random weights, mixed lengths.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from records import write_record
from training_rows import FULL, SMALL, write_images, write_mixed

from qwenvl_lit import build
from qwenvl_lit.callbacks.run_log import LOG, read_log
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.runs.versions import versions

MODELS = {
    "full": ("model=qwen_vl_chat", "model.weights=random", "model.vocabulary=tiny"),
    "small": ("model=qwen_vl_tiny", "adapter=lora"),
}
STEPS, MIDDLE = 6, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for rows and runs")
    parser.add_argument("--size", choices=MODELS, default="full")
    parser.add_argument("--record", type=Path, help="json file to add the result to")
    parser.add_argument("overrides", nargs="*", help="further arguments of train")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = MODELS[options.size]
    rows = options.work / "rows.jsonl"
    with initialize_config_dir(str(config_folder()), version_base=None):
        processor = build.processor(compose("train", list(model)))
    images = write_images(options.work, 16)
    write_mixed(rows, images, STEPS * 16, FULL if options.size == "full" else SMALL, processor)
    command = [
        *(sys.executable, "-m", "qwenvl_lit.train", *model, "data=jsonl", f"data.train={rows}"),
        *("data.validation=null", "data.batch_size=1", "trainer.accumulate_grad_batches=16"),
        *(f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "memory.check=false"),
        *("callbacks.checkpoint.every=1", f"callbacks.checkpoint.keep={STEPS}"),
        *("~callbacks.curves", "~callbacks.samples", *options.overrides),
    ]
    first, second, resumed = (options.work / name for name in ("first", "second", "resumed"))
    train([*command, f"hydra.run.dir={first}"])
    train([*command, f"hydra.run.dir={second}"])
    shutil.copytree(first, resumed)
    shutil.copy(resumed / f"checkpoints/step_{MIDDLE:06d}.ckpt", resumed / "checkpoints/last.ckpt")
    (resumed / LOG).unlink()
    train([sys.executable, "-m", "qwenvl_lit.train", f"resume={resumed}"])
    overrides = " ".join(options.overrides)
    result = {
        "command": f"python scripts/check_resume.py --size {options.size} {overrides}".strip(),
        "again": differences(first, second),
        "resumed": differences(first, resumed),
        "overrides": options.overrides,
        "versions": versions(),
    }
    print(json.dumps({name: result[name] for name in ("again", "resumed")}, indent=2))
    if options.record:
        known = json.loads(options.record.read_text()) if options.record.exists() else {}
        known[" ".join([options.size, *options.overrides])] = result
        write_record(options.record, known)


def train(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")


def differences(first: Path, second: Path) -> dict[str, Any]:
    """The losses of both runs by step, and how far their trained tensors are apart at the end."""
    ours, theirs = losses(first), losses(second)
    steps = sorted(set(ours) & set(theirs))
    tensors, others = trained(first), trained(second)
    largest, moved = 0.0, 0.0
    for name, tensor in tensors.items():
        largest = max(largest, float((tensor - others[name]).abs().max()))
        moved = max(moved, float(tensor.abs().max()))
    return {
        "losses": {step: [ours[step], theirs[step]] for step in steps},
        "equal": largest == 0 and all(ours[step] == theirs[step] for step in steps),
        "largest_difference_of_a_parameter": largest,
        "largest_parameter": moved,
    }


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_log(run / LOG) if "loss" in row}


def trained(run: Path) -> dict[str, torch.Tensor]:
    file = run / "checkpoints/last.ckpt"
    return torch.load(file, map_location="cpu", weights_only=True)["state_dict"]


if __name__ == "__main__":
    main()
