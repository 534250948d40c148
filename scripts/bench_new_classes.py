"""Teaches a trained demo four new classes of objects with adapters: benchmarks/new_classes.json.

Scores on the new classes say what was learned, those on the old classes what was forgotten.

python scripts/bench_new_classes.py outputs/train/demo    # some minutes on two CPU cores

On a GPU with the extra `quant`, results are added to those in the file:

python scripts/bench_new_classes.py outputs/train/demo --adapters qlora
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from records import write_record

from qwenvl_lit import __version__

RESULTS = Path(__file__).parent.parent / "benchmarks/new_classes.json"
METRICS = {  # metric -> column title
    "caption": "caption, exact",
    "counting": "counting",
    "left_right": "left / right",
    "grounded_caption": "grounded caption",
}
BEFORE = "the demo, before"


def run_command(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"qwenvl_lit.{name}", *arguments], check=True)


def fine_tune(demo: Path, adapter: str, folder: Path) -> dict[str, Mapping[str, float]]:
    """Fine-tunes the demo on the new classes, and scores it before and after.

    Returns:
        "baseline" and "test": scores by SET/METRIC; "trainable": the number of trained parameters
        and of steps.
    """
    run, scored = folder / adapter, folder / f"{adapter}_scores"
    run_command(
        "train",
        "experiment=new_classes",
        f"ckpt={demo}",
        f"adapter={adapter}",
        "adapter.dropout=0",
        f"hydra.run.dir={run}",
    )
    run_command(
        "test", f"ckpt={run}", "baseline=true", "~callbacks.boxes", f"hydra.run.dir={scored}"
    )
    trainable = json.loads((run / "trainable.json").read_text())
    steps = json.loads((run / "metrics.json").read_text())["fit"]["step"]
    scores = json.loads((scored / "metrics.json").read_text())
    return {**scores, "trainable": {"trained": trainable["trained"], "steps": steps}}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table with one line per model, and new and old classes side by side."""
    keys, titles = [], []
    for metric, title in METRICS.items():
        for classes in ("new", "old"):
            keys.append(f"{classes}_classes/{metric}")
            titles.append(f"{title}: {classes}")
    lines = [["adapter", "trained", *titles], ["---"] * (2 + len(titles))]
    for name, row in rows.items():
        trained = f"{row['trained']:,}" if "trained" in row else ""
        lines.append([name, trained, *(f"{row[key]:.3f}" for key in keys)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="a run folder of python -m qwenvl_lit.train")
    parser.add_argument("--adapters", nargs="+", default=["lora", "lora_all"])
    arguments = parser.parse_args()
    results = {"rows": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    with TemporaryDirectory() as folder:
        for adapter in arguments.adapters:
            scores = fine_tune(arguments.demo, adapter, Path(folder))
            results["rows"].setdefault(BEFORE, scores["baseline"])
            results["rows"][adapter] = {**scores["test"], **scores["trainable"]}
    results["made_with"] = {
        "qwenvl_lit": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_record(RESULTS, results)
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
