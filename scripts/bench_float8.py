"""Measures what `speed.float8=true` changes in training, compared with another seed.

    python scripts/bench_float8.py outputs/train/demo --record benchmarks/float8.json

Takes about twenty minutes on two CPU cores. A trained demo is fine-tuned on the rows of
`data=new_classes` with adapters on a frozen base, three times: plain, with FP8 matmuls in frozen
layers, and plain with adapters from another seed, on the same rows in the same order. A CPU
quantizes as a GPU does and accumulates in float32. Each run is scored on the test rows by
`python -m qwenvl_lit.test`, which uses no FP8.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_data import cpu_name

from qwenvl_lit.callbacks.run_log import LOG, read_log
from qwenvl_lit.metrics.summary import SCORES_FILE
from qwenvl_lit.runs.versions import versions

WINDOW = 20  # a smoothed loss is the mean of so many steps
TRAIN = (
    "experiment=new_classes",
    "adapter.dropout=0",
    "speed.compile=false",
    "trainer.log_every_n_steps=1",
    "~callbacks.samples",
)
RECORD = "benchmarks/float8.json"
NOTE = (
    f"deviations from the loss of the plain run, per step (raw) and of means over {WINDOW} steps "
    "(smoothed); plain is float32; other_seed has other initial adapters and sees the same rows in "
    "the same order; FP8 is used in training only, test scores are computed in float32"
)
RUNS = {"plain": (), "float8": ("speed.float8=true",), "other_seed": ("seed=43", "data.seed=42")}


def smoothed(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Moving averages over `window` losses."""
    if not 1 <= window <= len(losses):
        raise ValueError(
            f"{len(losses)} losses cannot be smoothed over {window}; train for more steps"
        )
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]


def deviation(losses: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """Deviations of a curve: absolute, and relative to `expected` at the same step.

    `bias` is the signed mean of losses - expected. `largest_at` is the step of `largest`, counted
    from 1; for smoothed curves the first step of its window.
    """
    pairs = list(zip(losses, expected, strict=True))
    absolute = [abs(loss - reference) for loss, reference in pairs]
    relative = [abs(loss - reference) / reference for loss, reference in pairs]
    return {
        "largest": max(absolute),
        "largest_at": absolute.index(max(absolute)) + 1,
        "mean": statistics.fmean(absolute),
        "largest_relative": max(relative),
        "mean_relative": statistics.fmean(relative),
        "bias": statistics.fmean(losses) - statistics.fmean(expected),
    }


def compare(losses: Sequence[float], expected: Sequence[float]) -> dict[str, dict[str, float]]:
    return {
        "raw": deviation(losses, expected),
        "smoothed": deviation(smoothed(losses), smoothed(expected)),
    }


def curve(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """The loss of each step of a `logging.jsonl`."""
    steps = [record for record in log if "loss" in record]
    if any(after["step"] != before["step"] + 1 for before, after in pairwise(steps)):
        raise ValueError("the log has gaps; train with trainer.log_every_n_steps=1")
    return [record["loss"] for record in steps]


def run_command(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"qwenvl_lit.{name}", *arguments], check=True)


def train_and_test(demo: Path, arguments: Sequence[str], run: Path) -> dict[str, Any]:
    """Fine-tunes `demo` into the folder `run`, unless that has been done already.

    Returns:
        The losses, the last validation and the scores on the test rows.
    """
    scored = run.with_name(f"{run.name}_scores")
    if not (run / SCORES_FILE).exists():
        run_command("train", f"ckpt={demo}", *arguments, f"hydra.run.dir={run}")
    if not (scored / SCORES_FILE).exists():
        run_command("test", f"ckpt={run}", "~callbacks.boxes", f"hydra.run.dir={scored}")
    return {
        "command": " ".join(["python -m qwenvl_lit.train ckpt=DEMO", *arguments]),
        "validation": json.loads((run / SCORES_FILE).read_text())["fit"]["last"],
        "test": json.loads((scored / SCORES_FILE).read_text())["test"],
        "loss": curve(read_log(run / LOG)),
    }


def choices(name: str, adapter: str, epochs: int) -> list[str]:
    """The arguments of the run `name`, without its starting checkpoint and its folder."""
    schedule = (f"trainer.max_epochs={epochs}", f"trainer.validate_every={epochs}.0")
    return [*TRAIN, f"adapter={adapter}", *schedule, *RUNS[name]]


def measure(demo: Path, adapter: str, epochs: int, folder: Path) -> dict[str, Any]:
    """Makes all runs with an adapter, and compares each with the plain one."""
    runs = {}
    for name in RUNS:
        arguments = choices(name, adapter, epochs)
        runs[name] = train_and_test(demo, arguments, folder / f"{adapter}_{name}")
    plain = runs["plain"]["loss"]
    others = [name for name in RUNS if name != "plain"]
    from_plain = {name: compare(runs[name]["loss"], plain) for name in others}
    return {"steps": len(plain), "from_plain": from_plain, "runs": runs}


def table(adapters: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: for each run, its deviation from the plain one and its test scores."""
    scores = ("new_classes/caption", "new_classes/grounded_caption", "old_classes/grounded_caption")
    deviations = ("largest deviation", "mean deviation")
    columns = ["adapter", "run", "loss, last", *deviations, "val/loss", *scores]
    lines = [columns, ["---"] * len(columns)]
    for adapter, measured in adapters.items():
        for name, run in measured["runs"].items():
            cells = [adapter, name, f"{smoothed(run['loss'])[-1]:.4f}", "", ""]
            if name in measured["from_plain"]:
                apart = measured["from_plain"][name]["smoothed"]
                mean = f"{apart['mean']:.4f} ({apart['mean_relative']:.1%})"
                cells[-2:] = [f"{apart['largest']:.3f}", mean]
            cells.append(f"{run['validation']['val/loss']:.4f}")
            cells += [f"{run['test'][key]:.3f}" for key in scores]
            lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="a run folder of python -m qwenvl_lit.train")
    parser.add_argument("--adapters", nargs="+", default=["lora_all", "lora"])
    parser.add_argument("--epochs", type=int, default=8, help="49 steps each")
    parser.add_argument(
        "--record", type=Path, help="JSON file; its results for other adapters are kept"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="folder to keep the runs in; those that have finished there are not repeated",
    )
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = arguments.runs or Path(temporary)
        adapters = {}
        for name in arguments.adapters:
            adapters[name] = measure(arguments.demo, name, arguments.epochs, folder)
    print(table(adapters))
    if arguments.record:
        before = {}
        if arguments.record.exists():
            before = json.loads(arguments.record.read_text())["adapters"]
        write(arguments.record, {**before, **adapters})


def write(file: Path, adapters: Mapping[str, Mapping[str, Any]]) -> None:
    content = {
        "command": f"python scripts/bench_float8.py outputs/train/demo --record {RECORD}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "versions": versions(),
        "note": NOTE,
        "adapters": json.loads(json.dumps(adapters), parse_float=_five_digits),
    }
    text = json.dumps(content, indent=1)
    # Puts a list of numbers, such as a loss curve, on one line
    text = re.sub(r"\[[\d\s.,e-]+\]", lambda match: " ".join(match[0].split()), text)
    file.write_text(text + "\n")


def _five_digits(number: str) -> float:
    return float(f"{float(number):.5g}")


if __name__ == "__main__":
    main()
