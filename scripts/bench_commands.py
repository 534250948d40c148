"""Measures whole commands at full size, from Enter to the last line: `train` and `predict`.

    python scripts/bench_commands.py --record benchmarks/commands.json
    python scripts/bench_commands.py --size small          # tries the script without a GPU

Commands have no options but the model, the data and, for `predict`, 20 new tokens. `train` reads
1,600 rows of 320 tokens with a JPEG each, `predict` answers 1,000 rows; random weights. Each runs
twice with one cache: the second run finds rows surveyed and kernels compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import training_rows
from bench_startup import device_name
from bench_train import Finished, follow
from records import write_record

from qwenvl_lit.runs.versions import versions

MODELS = {
    "full": ("model=qwen_vl_chat", "model.weights=random", "model.vocabulary=tiny"),
    "small": ("model=qwen_vl_tiny",),
}
ROWS = {"train": {"full": 1600, "small": 32}, "predict": {"full": 1000, "small": 16}}
IMAGES = 1000
NOTE = (
    "seconds from the start of the process to a line that it prints: first_line, first_step, "
    "last_step and end; run 2 finds the caches of run 1"
)

Measured = dict[str, Any]


def write_rows(folder: Path, size: str) -> dict[str, Path]:
    """Writes JPEG files and the rows of each command; returns their files by command."""
    from hydra import compose, initialize_config_dir

    from qwenvl_lit import build
    from qwenvl_lit.runs.run import config_folder

    with initialize_config_dir(str(config_folder()), version_base=None):
        processor = build.processor(compose("train", list(MODELS[size])))
    lengths = training_rows.FULL if size == "full" else training_rows.SMALL
    most = max(rows[size] for rows in ROWS.values())
    images = training_rows.write_images(folder, min(IMAGES, most))
    files = {}
    for name, rows in ROWS.items():
        files[name] = folder / f"{name}.jsonl"
        training_rows.write_even(files[name], images, rows[size], lengths, processor)
    return files


def command_line(name: str, size: str, file: Path) -> list[str]:
    line = ["python", "-m", f"qwenvl_lit.{name}", *MODELS[size], "data=jsonl"]
    if name == "train":
        return [*line, f"data.train={file}"]
    new_tokens = ("generation.max_new_tokens=20", "generation.min_new_tokens=20")
    return [*line, f"data.test={file}", *new_tokens]


def measure(line: Sequence[str], work: Path, runs: int) -> list[Measured]:
    """Runs a command several times with one cache, and returns when it printed what."""
    measured = []
    for number in range(1, runs + 1):
        folder = work / f"{line[2]}_{number}"
        cache = str(work / "cache")
        process = follow([*line, f"hydra.run.dir={folder}"], 600, QWENVL_LIT_CACHE=cache)
        if process.code:
            raise SystemExit("\n".join(text for _, text in process.lines[-60:]))
        measured.append(moments(process))
        print(*(f"{seconds:7.1f} {text}" for seconds, text in process.lines), sep="\n")
        print(json.dumps(measured[-1]), flush=True)
    return measured


def moments(process: Finished) -> Measured:
    steps = [seconds for seconds, text in process.lines if re.match(r"step \d+/", text)]
    found: Measured = {"first_line": process.lines[0][0]}
    if steps:
        found |= {"first_step": steps[0], "last_step": steps[-1]}
    rates = re.compile(r"([\d.]+) images/s")
    images = [match[1] for _, text in process.lines if (match := rates.search(text))]
    if images:
        found["images_per_s"] = float(images[0])
    found["end"] = process.seconds
    return {name: round(seconds, 1) for name, seconds in found.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commands", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--size", default="full", choices=list(MODELS))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--record", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as work:
        files = write_rows(Path(work), arguments.size)
        for name in arguments.commands:
            file = files[name]
            line = command_line(name, arguments.size, file)
            results[name] = {
                "command": " ".join(line).replace(str(file), file.name),
                "rows": ROWS[name][arguments.size],
                "runs": measure(line, Path(work), arguments.runs),
            }
            if arguments.record:
                options = ["--commands", *arguments.commands, "--runs", str(arguments.runs)]
                record = {
                    "command": " ".join(["python scripts/bench_commands.py", *options]),
                    "device": device_name(),
                    "versions": versions(),
                    "note": NOTE,
                    "results": results,
                }
                write_record(arguments.record, record)


if __name__ == "__main__":
    main()
