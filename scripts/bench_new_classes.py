"""Teach a trained demo four new classes of objects with adapters, and say what it learned and what it forgot: benchmarks/new_classes.json.

python scripts/bench_new_classes.py outputs/train/demo                     # two CPU cores: some minutes
python scripts/bench_new_classes.py outputs/train/demo --adapters qlora    # on a GPU, with the extra `quant`; added to what is in the file
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

from qwenvl_lit import __version__

RESULTS = Path(__file__).parent.parent / "benchmarks/new_classes.json"
SHOWN = {
    "caption": "caption, exact",
    "counting": "counting",
    "left_right": "left / right",
    "grounded_caption": "grounded caption",
}
BEFORE = "the demo, before"


def verb(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"qwenvl_lit.{name}", *arguments], check=True)


def taught(demo: Path, adapter: str, folder: Path) -> dict[str, Mapping[str, float]]:
    """Scores of the demo (`baseline`) and of what becomes of it (`test`), by SET/METRIC, and what was trained (`trainable`)."""
    run, scored = folder / adapter, folder / f"{adapter}_scores"
    verb(
        "train",
        "experiment=new_classes",
        f"ckpt={demo}",
        f"adapter={adapter}",
        "adapter.dropout=0",
        f"hydra.run.dir={run}",
    )
    verb("test", f"ckpt={run}", "baseline=true", "~callbacks.boxes", f"hydra.run.dir={scored}")
    scores = json.loads((scored / "metrics.json").read_text())
    steps = json.loads((run / "metrics.json").read_text())["fit"]["step"]
    return {
        **scores,
        "trainable": {
            "trained": json.loads((run / "trainable.json").read_text())["trained"],
            "steps": steps,
        },
    }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line for each model, new and old classes side by side."""
    columns = [
        (f"{classes}_classes/{key}", f"{title}: {classes}")
        for key, title in SHOWN.items()
        for classes in ("new", "old")
    ]
    lines = [["adapter", "trained", *(title for _, title in columns)], ["---"] * (2 + len(columns))]
    for name, row in rows.items():
        trained = f"{row['trained']:,}" if "trained" in row else ""
        lines.append([name, trained, *(f"{row[key]:.3f}" for key, _ in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="a run folder of python -m qwenvl_lit.train")
    parser.add_argument("--adapters", nargs="+", default=["lora", "lora_all"])
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    with TemporaryDirectory() as folder:
        for adapter in arguments.adapters:
            scores = taught(arguments.demo, adapter, Path(folder))
            found["rows"].setdefault(BEFORE, scores["baseline"])
            found["rows"][adapter] = {**scores["test"], **scores["trainable"]}
    found["made_with"] = {
        "qwenvl_lit": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
