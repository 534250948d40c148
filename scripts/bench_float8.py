"""What `speed.float8=true` changes in training: loss curves with it and without, and how far two seeds are apart.

python scripts/bench_float8.py outputs/train/demo --record benchmarks/float8.json     # two CPU cores: some twenty minutes

A trained demo learns the rows of `data=new_classes` with adapters, its base frozen, three times: plain, with frozen layers in 8 bits, and
plain with adapters drawn from another seed, on the same rows in the same order. A CPU rounds to the same 8 bits as a GPU and adds up in
float32. Each run is scored on the test rows by `python -m qwenvl_lit.test`, which computes in 8 bits for none of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_data import cpu_name

from qwenvl_lit import __version__
from qwenvl_lit.callbacks.run_log import LOG, SCORES, read_log

WINDOW = 20  # steps that a smoothed loss is the mean of
TRAIN = (
    "experiment=new_classes",
    "adapter.dropout=0",
    "speed.compile=false",
    "trainer.log_every_n_steps=1",
    "~callbacks.samples",
)
RUNS = {"plain": (), "float8": ("speed.float8=true",), "other_seed": ("seed=43", "data.seed=42")}


def smoothed(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means over `window` losses in a row: the first of the first ones, the last of the last."""
    if not 1 <= window <= len(losses):
        raise ValueError(
            f"{len(losses)} losses cannot be smoothed over {window}; train for more steps"
        )
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]


def deviation(found: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """How far two curves are apart: absolute, and relative to `expected` at the same place.

    `bias` is the mean of found - expected with its sign; `largest_at` the step of `largest`, from 1 on, or the first of its window.
    """
    apart = [abs(one - other) for one, other in zip(found, expected, strict=True)]
    relative = [difference / other for difference, other in zip(apart, expected, strict=True)]
    return {
        "largest": max(apart),
        "largest_at": apart.index(max(apart)) + 1,
        "mean": statistics.fmean(apart),
        "largest_relative": max(relative),
        "mean_relative": statistics.fmean(relative),
        "bias": statistics.fmean(found) - statistics.fmean(expected),
    }


def compared(found: Sequence[float], expected: Sequence[float]) -> dict[str, dict[str, float]]:
    return {
        "raw": deviation(found, expected),
        "smoothed": deviation(smoothed(found), smoothed(expected)),
    }


def curve(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """The loss of each step of a `logging.jsonl`."""
    steps = [record for record in log if "loss" in record]
    if any(after["step"] != before["step"] + 1 for before, after in pairwise(steps)):
        raise ValueError("the log lacks steps; train with trainer.log_every_n_steps=1")
    return [record["loss"] for record in steps]


def verb(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"qwenvl_lit.{name}", *arguments], check=True)


def trained(demo: Path, arguments: Sequence[str], run: Path) -> dict[str, Any]:
    """Train on top of `demo`: the losses, the run's last validation and the scores of the test rows. What is there is not made again."""
    scored = run.with_name(f"{run.name}_scores")
    if not (run / SCORES).exists():
        verb("train", f"ckpt={demo}", *arguments, f"hydra.run.dir={run}")
    if not (scored / SCORES).exists():
        verb("test", f"ckpt={run}", "~callbacks.boxes", f"hydra.run.dir={scored}")
    return {
        "command": " ".join(["python -m qwenvl_lit.train ckpt=DEMO", *arguments]),
        "validation": json.loads((run / SCORES).read_text())["fit"]["last"],
        "test": json.loads((scored / SCORES).read_text())["test"],
        "loss": curve(read_log(run / LOG)),
    }


def choices(name: str, adapter: str, epochs: int) -> list[str]:
    """What the run `name` is told on the command line, but for its start and its folder."""
    schedule = (f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={epochs}")
    return [*TRAIN, f"adapter={adapter}", *schedule, *RUNS[name]]


def measure(demo: Path, adapter: str, epochs: int, folder: Path) -> dict[str, Any]:
    """All runs of an adapter, and how far each is from the plain one."""
    runs = {
        name: trained(demo, choices(name, adapter, epochs), folder / f"{adapter}_{name}")
        for name in RUNS
    }
    plain = runs["plain"]["loss"]
    return {
        "steps": len(plain),
        "from_plain": {
            name: compared(run["loss"], plain) for name, run in runs.items() if name != "plain"
        },
        "runs": runs,
    }


def table(adapters: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: of each adapter, how far the loss of each run is from the plain one, and what the runs score on the test rows."""
    scores = ("new_classes/caption", "new_classes/grounded_caption", "old_classes/grounded_caption")
    columns = [
        "adapter",
        "run",
        "loss, last",
        "largest deviation",
        "mean deviation",
        "val/loss",
        *scores,
    ]
    lines = [columns, ["---"] * len(columns)]
    for adapter, measured in adapters.items():
        for name, run in measured["runs"].items():
            apart = measured["from_plain"].get(name, {}).get("smoothed")
            shown = (
                [f"{apart['largest']:.3f}", f"{apart['mean']:.4f} ({apart['mean_relative']:.1%})"]
                if apart
                else ["", ""]
            )
            last = f"{smoothed(run['loss'])[-1]:.4f}"
            figures = [
                f"{run['validation']['val/loss']:.4f}",
                *(f"{run['test'][key]:.3f}" for key in scores),
            ]
            lines.append([adapter, name, last, *shown, *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="a run folder of python -m qwenvl_lit.train")
    parser.add_argument("--adapters", nargs="+", default=["lora_all", "lora"])
    parser.add_argument("--epochs", type=int, default=8, help="of 49 steps each")
    parser.add_argument(
        "--record", type=Path, help="json of results; what it has of other adapters stays"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="where run folders are kept; what is finished there is not run again",
    )
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = arguments.runs or Path(temporary)
        adapters = {
            name: measure(arguments.demo, name, arguments.epochs, folder)
            for name in arguments.adapters
        }
    print(table(adapters))
    if arguments.record:
        before = (
            json.loads(arguments.record.read_text())["adapters"]
            if arguments.record.exists()
            else {}
        )
        write(arguments.record, {**before, **adapters})


def write(file: Path, adapters: Mapping[str, Mapping[str, Any]]) -> None:
    content = {
        "command": "python scripts/bench_float8.py outputs/train/demo --record benchmarks/float8.json",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
        | {"qwenvl_lit": __version__},
        "note": f"deviations from the plain run's loss, step by step (raw) and of means over {WINDOW} steps (smoothed); plain is "
        "float32; other_seed draws other adapters and sees the same rows in the same order; 8 bits are for training, "
        "test scores are computed in float32",
        "adapters": json.loads(
            json.dumps(adapters), parse_float=lambda digits: float(f"{float(digits):.5g}")
        ),
    }
    lines = json.dumps(content, indent=1)
    file.write_text(
        re.sub(r"\[[\d\s.,e-]+\]", lambda numbers: " ".join(numbers[0].split()), lines) + "\n"
    )  # a curve is one line


if __name__ == "__main__":
    main()
