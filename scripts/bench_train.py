"""Speed and memory of training through the real entry point: each case is a run of `python -m qwenvl_lit.train` on JPEG files from disk.

    python scripts/bench_train.py --record benchmarks/train.json --limit-s 560 --plot /tmp/train.png     every case of one card
    python scripts/bench_train.py --record benchmarks/train.json --limit-s 560 --only-missing            what the first call did not reach
    python scripts/bench_train.py --record benchmarks/train.json --cases two_cards                       or single cases by name
    python scripts/bench_train.py --size small --device cpu --steps 6 --cases bf16_8 mixed_8192          tries this script

Weights are random and of full size; LoRA on c_attn unless a case says otherwise. A row has 320 tokens, 16 of them learned, and one image
of 640 x 480; rows of mixed lengths have 32 to 1,500 tokens and up to 4 images. The steps before the measured ones are warm-up. A case is
written to the record as soon as it is measured, in place of an older result of the same name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import training_rows
from training_cases import CASES, GROUPS, TWINS, Case

from qwenvl_lit.callbacks.run_log import LOG, read_log

WINDOWS = 6  # of the measured steps, each with a rate of its own; the steps of one more before them are warm-up
CPU_STRATEGY = {"auto": "cpu", "ddp": "ddp_cpu", "fsdp": "fsdp_cpu"}
SMALL = {"batch": 2, "accumulate": 2, "max_tokens": 512}  # the most that a case of --size small has


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """How cases are run."""

    size: str
    device: str
    checkpoint: Path | None
    workers: int
    images: int
    steps: int | None
    work: Path
    extra: tuple[str, ...]

    @property
    def lengths(self) -> training_rows.Lengths:
        return training_rows.FULL if self.size == "full" else training_rows.SMALL

    def batch(self, case: Case) -> int:
        return case.batch if self.size == "full" else min(case.batch, SMALL["batch"])

    def accumulate(self, case: Case) -> int:
        return case.accumulate if self.size == "full" else min(case.accumulate, SMALL["accumulate"])

    def max_tokens(self, case: Case) -> int | None:
        return (
            case.max_tokens if self.size == "full" or not case.max_tokens else SMALL["max_tokens"]
        )

    def window(self, case: Case) -> int:
        """Optimizer steps of a window."""
        return max(1, (self.steps or case.steps) // WINDOWS)

    def total_steps(self, case: Case) -> int:
        return self.window(case) * (WINDOWS + 1)

    def model(self) -> list[str]:
        if self.size == "small":
            return ["model=qwen_vl_tiny", "adapter=lora"]
        if self.checkpoint:
            return ["model=qwen_vl_chat", f"model.path={self.checkpoint}"]
        return ["model=qwen_vl_chat", "model.weights=random", "model.vocabulary=tiny"]

    def arguments(self, case: Case) -> list[str]:
        """Of `python -m qwenvl_lit.train`, but for files and folders."""
        window, accumulate = self.window(case), self.accumulate(case)
        made = [*self.model(), "data=jsonl", *case.arguments]
        strategy = CPU_STRATEGY[case.strategy] if self.device == "cpu" else case.strategy
        made += [f"strategy={strategy}"] if strategy != "auto" else []
        made += (
            ["speed.compile=false"] if self.size == "small" else []
        )  # it takes longer than all the rest
        made += (
            [f"data.max_tokens={self.max_tokens(case)}"]
            if case.max_tokens
            else [f"data.batch_size={self.batch(case)}"]
        )
        made += [
            "data.validation=null",
            f"data.num_workers={self.workers}",
            f"trainer.accumulate_grad_batches={accumulate}",
        ]
        made += [f"trainer.max_steps={self.total_steps(case)}", "trainer.max_epochs=-1"]
        made += [
            f"trainer.log_every_n_steps={window}",
            f"+callbacks.throughput.window={window * accumulate}",
        ]
        return [
            *made,
            "~callbacks.samples",
            "~callbacks.curves",
            "~callbacks.checkpoint",
            *self.extra,
        ]

    def write_rows(self, cases: Sequence[Case]) -> dict[str, Path]:
        """A file for each kind of rows that the cases have, with as many rows as the longest of them needs in one epoch."""
        from hydra import compose, initialize_config_dir

        from qwenvl_lit.build import processor as built
        from qwenvl_lit.cli.command import config_folder

        with initialize_config_dir(str(config_folder()), version_base=None):
            processor = built(compose("train", self.model()))
        images = training_rows.write_images(self.work / "rows", self.images)
        files = {
            kind: self.work / f"rows/{kind}.jsonl" for kind in sorted({case.rows for case in cases})
        }
        batches = [
            (case, (self.total_steps(case) + 1) * self.accumulate(case) * case.cards)
            for case in cases
        ]
        if "even" in files:
            rows = max(count * self.batch(case) for case, count in batches if case.rows == "even")
            training_rows.write_even(files["even"], images, rows, self.lengths, processor)
        if "mixed" in files:
            tokens = max(
                count * (self.max_tokens(case) or 0)
                for case, count in batches
                if case.rows == "mixed"
            )
            rows = tokens * 2 // self.lengths.mixed[1] * 5 // 4
            training_rows.write_mixed(files["mixed"], images, rows, self.lengths, processor)
        return files


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What a process printed, and when, in seconds after its start."""

    lines: list[tuple[float, str]]
    code: int
    seconds: float

    def when(self, beginning: str) -> float | None:
        return next((seconds for seconds, line in self.lines if line.startswith(beginning)), None)


def follow(command: Sequence[str], limit_s: float, **environment: str) -> Ran:
    """Run a process, and end it and all that it started after `limit_s`."""
    start = time.perf_counter()
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, **options
    )
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines = [(time.perf_counter() - start, line.rstrip("\n")) for line in process.stdout]
    code = process.wait()
    timer.cancel()
    return Ran(lines=lines, code=code, seconds=time.perf_counter() - start)


def ceilings(device: str) -> dict[str, Any]:
    """Of `ceilings.py`, in a process of its own, which leaves no memory of the device taken."""
    command = [sys.executable, Path(__file__).with_name("ceilings.py"), "--device", device]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure(
    name: str, bench: Bench, rows: Mapping[str, Path], machine: Mapping[str, Any], limit_s: float
) -> dict[str, Any]:
    """One case; `failed` or `not_measured` says why there are no figures."""
    case, folder = CASES[name], bench.work / name
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [*bench.arguments(case), f"data.train={rows[case.rows]}", f"hydra.run.dir={folder}"]
    cache = os.environ.get("QWENVL_LIT_CACHE", str(bench.work / "cache"))
    ran = follow(
        [sys.executable, "-m", "qwenvl_lit.train", *arguments], limit_s, QWENVL_LIT_CACHE=cache
    )
    log = [line for line in read_log(folder / LOG) if "loss" in line]
    shutil.rmtree(folder, ignore_errors=True)
    result = {
        **described(name, bench),
        "device": machine["device"],
        "versions": versions(machine),
        "wall_s": round(ran.seconds, 1),
    }
    if ran.code and ran.seconds >= limit_s:
        return result | {"not_measured": f"it was ended after the {limit_s:.0f} s that were left"}
    if ran.code:
        print("\n".join(line for _, line in ran.lines[-60:]))
        said = [line for _, line in ran.lines if line.strip()]
        return result | {"failed": said[-1][:500] if said else f"exit {ran.code}"}
    return result | timeline(ran, log) | figures(log, machine)


def described(name: str, bench: Bench) -> dict[str, Any]:
    case = CASES[name]
    rows = f"{bench.max_tokens(case)} tokens" if case.max_tokens else f"batch {bench.batch(case)}"
    accumulate = f" x {bench.accumulate(case)}" if case.accumulate > 1 else ""
    cards = f", {case.cards} cards" if case.cards > 1 else ""
    arguments = [
        str(one).replace(str(bench.checkpoint), "CHECKPOINT") for one in bench.arguments(case)
    ]
    command = " ".join(["python -m qwenvl_lit.train", *arguments, "data.train=ROWS"])
    return {"case": name, "what": f"{case.what}, {rows}{accumulate}{cards}", "command": command}


def versions(machine: Mapping[str, Any]) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": machine["torch"],
        "transformers": version("transformers"),
    }


def timeline(ran: Ran, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds before the steady part: compilation is in the first step, and may come again in the warm-up."""
    first = ran.when("step 1/") or 0.0
    begun = first - log[0]["elapsed_s"]
    found = {
        "start_s": begun,
        "first_step_s": log[0]["elapsed_s"],
        "warm_up_s": parted(log)[0]["elapsed_s"],
    }
    if (cache := ran.when("Vision cache:")) is not None:
        found["vision_pass_s"] = (
            begun - cache
        )  # a part of `start_s`; short where an earlier case has filled the cache
    return {key: round(value, 1) for key, value in found.items()}


def parted(log: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The line of the log at the end of the warm-up, and those at the end of each window."""
    window = log[-1]["step"] // (WINDOWS + 1)
    [warm] = [line for line in log if line["step"] == window]
    return warm, [line for line in log if line["step"] > window]


def figures(log: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Medians over the windows of a run."""
    warm, windows = parted(log)

    def median(key: str) -> float | None:
        values = [line[key] for line in windows if line.get(key) is not None]
        return float(f"{statistics.median(values):.4g}") if values else None

    rates = [line["samples_per_second"] for line in windows]
    names = (
        "samples_per_second",
        "tokens_per_second",
        "supervised_tokens_per_second",
        "padding_share",
        "waiting_share",
    )
    found: dict[str, Any] = {
        "steps": windows[-1]["step"] - warm["step"],
        **{name: median(name) for name in names},
    }
    found["samples_per_second_of_windows"] = [float(f"{rate:.4g}") for rate in rates]
    found["real_share"] = round(1 - statistics.median(line["padding_share"] for line in windows), 4)
    found |= {name: median(name) for name in ("tflop_per_second", "mfu")}
    found["share_of_matmul"] = round(found["tflop_per_second"] / machine["matmul_tflops"], 3)
    found["peak_memory_gib"] = windows[-1].get("memory_gib")
    found["compilations"] = {
        "warm_up": int(warm["compilations"]),
        "later": int(windows[-1]["compilations"] - warm["compilations"]),
    }
    found["losses"] = [line["loss"] for line in log]
    found["losses_finite"] = None not in found["losses"]
    return found


def judged(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results with what two of them say together, and what is asked of each beside what was found."""
    said = ("times_one_card", "targets")  # of results that are older than what is asked now
    made = {
        name: {key: value for key, value in result.items() if key not in said}
        for name, result in results.items()
    }
    for name, twin in TWINS.items():
        pair = [made.get(one, {}).get("samples_per_second") for one in (name, twin)]
        if all(pair) and made[name]["device"] == made[twin]["device"]:
            made[name]["times_one_card"] = round(pair[0] / pair[1], 2)
    for name, result in made.items():
        found = {key: (least, result.get(key)) for key, least in CASES[name].targets.items()}
        if "samples_per_second" in result and result["device"] != "cpu":
            result["targets"] = {
                key: {
                    "at_least": least,
                    "found": value,
                    "met": value is not None and value >= least,
                }
                for key, (least, value) in found.items()
            }
    return made


class Record:
    """The results, on disk after each case."""

    def __init__(self, file: Path | None, bench: Bench):
        self.file, self.bench = file, bench
        stored = json.loads(file.read_text()) if file and file.exists() else {}
        self.ceilings: dict[str, Any] = stored.get("ceilings", {})  # by device
        self.results = {
            one["case"]: one
            for one in stored.get("results", ())
            if one["case"] in CASES and "samples_per_second" in one
        }

    def measured(self, name: str) -> bool:
        return "samples_per_second" in self.results.get(name, {})

    def add(self, result: dict[str, Any]) -> None:
        """Take a result; one without figures does not replace one with."""
        if "samples_per_second" in result or not self.measured(result["case"]):
            self.results[result["case"]] = result
        self.write()

    def content(self) -> dict[str, Any]:
        small = f" --size small --device {self.bench.device}" if self.bench.size == "small" else ""
        command = (
            f"python scripts/bench_train.py --record {self.file or 'benchmarks/train.json'}{small}"
        )
        known = judged(self.results)
        lacking = {"not_measured": "not yet"}
        results = [known.get(name) or {**described(name, self.bench), **lacking} for name in CASES]
        results = [
            one
            if "samples_per_second" in one
            else {**one, "measure_with": f"{command} --cases {one['case']}"}
            for one in results
        ]
        lengths = self.bench.lengths
        mixed = f"mixed: {lengths.mixed[0]} to {lengths.mixed[1]} tokens, 0 to {lengths.most_images} images"
        return {
            "command": command,
            "model": "Qwen-VL of 9.66 B parameters, bfloat16"
            if self.bench.size == "full"
            else "the demo's network, float32",
            "rows": f"JPEGs of 640 x 480; {lengths.even} tokens a row with an image, {lengths.learned} learned; {mixed}",
            "note": "medians over windows of steps; tflop_per_second, mfu and peak_memory_gib are of a card, the other rates of all; "
            "first_step_s has compilation in it, which torch keeps on disk for the cases that follow; share_of_matmul is of bfloat16",
            "ceilings": self.ceilings,
            "results": results,
        }

    def write(self) -> None:
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.content(), indent=1) + "\n")


def sweep(names: Sequence[str], bench: Bench, record: Record, limit_s: float) -> None:
    """Measure the cases, one after the other, as far as time allows."""
    end = time.perf_counter() + limit_s
    machine = ceilings(bench.device)
    print(json.dumps(machine), flush=True)
    record.ceilings[machine["device"]] = machine
    possible = [name for name in names if bench.device != "cpu" or CASES[name].needs != "gpu"]
    rows = bench.write_rows([CASES[name] for name in possible]) if possible else {}
    for name in names:
        left = end - time.perf_counter()
        if name not in possible:
            record.add({**described(name, bench), "not_measured": "it needs a GPU"})
        elif bench.size == "full" and left < CASES[name].seconds:
            record.add(
                {
                    **described(name, bench),
                    "not_measured": f"{left:.0f} s were left, it takes about {CASES[name].seconds}",
                }
            )
        else:
            record.add(measure(name, bench, rows, machine, left))
        print(line(judged(record.results)[name]), flush=True)


def line(result: Mapping[str, Any]) -> str:
    """A result to read.

    >>> line({"case": "bf16_8", "not_measured": "it needs a GPU"})
    'bf16_8             not measured: it needs a GPU'
    """
    beginning = f"{result['case']:<18} "
    if "samples_per_second" not in result:
        return beginning + (
            f"failed: {result['failed']}"
            if "failed" in result
            else f"not measured: {result['not_measured']}"
        )
    keys = (
        "samples_per_second",
        "tflop_per_second",
        "share_of_matmul",
        "mfu",
        "real_share",
        "waiting_share",
        "peak_memory_gib",
    )
    shown = [
        f"{key} {result[key]}"
        for key in (*keys, "times_one_card", "start_s", "first_step_s")
        if result.get(key) is not None
    ]
    asked = [
        f"{key} {'met' if target['met'] else 'MISSED'}"
        for key, target in result.get("targets", {}).items()
    ]
    return beginning + "  ".join([*shown, *asked])


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="*",
        choices=[*GROUPS, *CASES],
        default=["one_card"],
        metavar="NAME",
        help=f"{[*GROUPS, *CASES]}",
    )
    parser.add_argument(
        "--only-missing", action="store_true", help="leave cases out that the record has figures of"
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=86_400,
        help="what does not fit into so many seconds is left out, and said",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="optimizer steps that are measured; default: 60, and fewer for accumulated ones",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a folder, say of scripts/make_checkpoint.py; default: weights are drawn",
    )
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="distinct ones, for all rows")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("/tmp/bench_train"),
        help="a folder for rows, runs and caches",
    )
    parser.add_argument("--record", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("extra", nargs="*", help="further arguments for every run, after --")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    chosen = [name for one in arguments.cases for name in GROUPS.get(one, {one: None})]
    fields = ("size", "device", "checkpoint", "workers", "images", "steps", "work")
    bench = Bench(
        **{name: getattr(arguments, name) for name in fields}, extra=tuple(arguments.extra)
    )
    record = Record(arguments.record, bench)
    names = [
        name
        for name in dict.fromkeys(chosen)
        if not (arguments.only_missing and record.measured(name))
    ]
    if names:
        sweep(names, bench, record, arguments.limit_s)
    record.write()
    if arguments.plot:
        from plot_train import draw

        draw(record.content(), arguments.plot)


if __name__ == "__main__":
    main()
