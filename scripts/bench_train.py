"""Measures speed and memory of training through the entry point, on JPEG files from disk.

    RECORD="--record benchmarks/train.json --limit-s 560"
    python scripts/bench_train.py $RECORD --plot /tmp/train.png     # all cases for one GPU
    python scripts/bench_train.py $RECORD --only-missing            # the cases not measured yet
    python scripts/bench_train.py $RECORD --cases two_gpus          # a group, or cases by name
    python scripts/bench_train.py --size small --device cpu --steps 6 --cases bf16_8 mixed_8192

The last line tries this script. Each case is a run of `python -m qwenvl_lit.train` with random
weights of full size, and Qwen-VL with LoRA on c_attn unless the case says otherwise. A row has 320
tokens (512 for other models), 16 of them supervised, and one image of 640 x 480; rows of mixed
lengths have 32 to 1,500 tokens and up to 4 images. The steps before the measured ones are warm-up.
A case is written to the record as soon as it is measured, in place of an older result with the same
name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import training_rows
from records import record_option, write_record
from training_cases import CASES, GROUPS, Case
from training_results import WINDOWS, Log, Result, figures, judge, split_log, summary

from qwenvl_lit.callbacks.run_log import LOG, read_log
from qwenvl_lit.runs.versions import FILENAME

CPU_STRATEGY = {"auto": "cpu", "ddp": "ddp_cpu", "fsdp": "fsdp_cpu"}
DEFAULT_ROWS_PER_STEP = 16
TINY = {  # models that stand for larger ones with --size small
    "qwen_vl_chat": "qwen_vl_tiny",
    "qwen2_5_vl_7b": "qwen2_5_vl_tiny",
    "qwen3_vl_2b": "qwen3_vl_tiny",
    "qwen3_vl_8b": "qwen3_vl_tiny",
}
SMALL = {"batch": 2, "accumulate": 2, "max_tokens": 512}  # limits for a case with --size small
NOTE = (
    "medians over windows of steps; tflop_per_second, mfu and peak_memory_gib are per GPU, other "
    "rates are of all GPUs; first_step_s includes compilation, which torch caches on disk for the "
    "following cases; share_of_matmul is relative to bfloat16"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """How cases are run: the options of the command line."""

    size: str
    device: str
    checkpoint: Path | None
    workers: int
    images: int
    steps: int | None
    work: Path
    extra: tuple[str, ...]

    def lengths(self, model: str = "qwen_vl_chat") -> training_rows.Lengths:
        """The lengths of rows for a model of `conf/model`."""
        if self.size == "small":
            return training_rows.SMALL
        is_qwen_vl = model == "qwen_vl_chat"
        return training_rows.FULL if is_qwen_vl else training_rows.OTHER_MODELS

    def batch(self, case: Case) -> int:
        """Rows of a batch; with the default settings, of an optimizer step."""
        batch = case.batch or DEFAULT_ROWS_PER_STEP
        return batch if self.size == "full" else min(batch, SMALL["batch"])

    def accumulate(self, case: Case) -> int:
        return case.accumulate if self.size == "full" else min(case.accumulate, SMALL["accumulate"])

    def max_tokens(self, case: Case) -> int | None:
        if self.size == "small" and case.max_tokens:
            return SMALL["max_tokens"]
        return case.max_tokens

    def window(self, case: Case) -> int:
        """Optimizer steps of a window."""
        return max(1, (self.steps or case.steps) // WINDOWS)

    def total_steps(self, case: Case) -> int:
        return self.window(case) * (WINDOWS + 1)

    def model(self, name: str = "qwen_vl_chat") -> list[str]:
        if self.size == "small":
            return [f"model={TINY[name]}", "adapter=lora"]
        if self.checkpoint:
            return [f"model={name}", f"model.path={self.checkpoint}"]
        return [f"model={name}", "model.weights=random", "model.vocabulary=tiny"]

    def arguments(self, case: Case) -> list[str]:
        """The arguments of `python -m qwenvl_lit.train`, except files and folders."""
        arguments = [*self.model(case.model), "data=jsonl", *case.arguments]
        strategy = CPU_STRATEGY[case.strategy] if self.device == "cpu" else case.strategy
        if strategy != "auto":
            arguments.append(f"strategy={strategy}")
        if self.size == "small":
            arguments.append("speed.compile=false")  # it would take longer than everything else
        if case.max_tokens:
            arguments.append(f"data.max_tokens={self.max_tokens(case)}")
        elif case.batch is not None:
            arguments.append(f"data.batch_size={self.batch(case)}")
        elif self.size == "small":
            arguments.append(f"trainer.rows_per_step={self.batch(case)}")
        window, accumulate = self.window(case), self.accumulate(case)
        if case.batch is not None:
            arguments.append(f"trainer.accumulate_grad_batches={accumulate}")
        return [
            *arguments,
            "data.validation=null",
            f"data.num_workers={self.workers}",
            f"trainer.max_steps={self.total_steps(case)}",
            "trainer.max_epochs=-1",
            f"trainer.log_every_n_steps={window}",
            f"callbacks.throughput.window={window * accumulate}",
            "~callbacks.samples",
            "~callbacks.curves",
            "~callbacks.checkpoint",
            *self.extra,
        ]

    def write_rows(self, cases: Sequence[Case]) -> dict[tuple[str, str], Path]:
        """Writes a file for each kind of rows that the cases need, with enough rows for one epoch.

        Returns:
            The files by model and kind.
        """
        images = training_rows.write_images(self.work / "rows", self.images)
        files = {}
        for model in dict.fromkeys(case.model for case in cases):
            of_model = [case for case in cases if case.model == model]
            for kind, file in self._write_rows_of(model, of_model, images).items():
                files[model, kind] = file
        return files

    def _write_rows_of(
        self, model: str, cases: Sequence[Case], images: list[str]
    ) -> dict[str, Path]:
        from hydra import compose, initialize_config_dir

        from qwenvl_lit import build
        from qwenvl_lit.runs.run import config_folder

        with initialize_config_dir(str(config_folder()), version_base=None):
            processor = build.processor(compose("train", self.model(model)))
        lengths = self.lengths(model)
        even_rows = mixed_rows = mixed_tokens = 0
        for case in cases:
            batches = (self.total_steps(case) + 1) * self.accumulate(case) * case.gpus
            rows, tokens = batches * self.batch(case), batches * (self.max_tokens(case) or 0)
            if case.rows == "even":
                even_rows = max(even_rows, tokens // lengths.even or rows)
            elif case.max_tokens is None:
                mixed_rows = max(mixed_rows, rows)
            else:
                mixed_tokens = max(mixed_tokens, tokens)
        files = {}
        if even_rows:
            files["even"] = self.work / "rows" / f"{model}_even.jsonl"
            training_rows.write_even(files["even"], images, even_rows, lengths, processor)
        if mixed_rows or mixed_tokens:
            files["mixed"] = self.work / "rows" / f"{model}_mixed.jsonl"
            rows = max(mixed_rows, mixed_tokens * 2 // lengths.mixed[1] * 5 // 4)
            training_rows.write_mixed(files["mixed"], images, rows, lengths, processor)
        return files


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A process that has ended, with the lines it printed and when, in seconds after its start."""

    lines: list[tuple[float, str]]
    code: int
    seconds: float

    def time_of(self, beginning: str) -> float | None:
        """When the first line that begins so was printed."""
        times = (seconds for seconds, line in self.lines if line.startswith(beginning))
        return next(times, None)


def follow(command: Sequence[str], limit_s: float, **environment: str) -> Finished:
    """Runs a process; kills it after `limit_s`, together with all processes that it started."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines = [(time.perf_counter() - start, line.rstrip("\n")) for line in process.stdout]
    code = process.wait()
    timer.cancel()
    return Finished(lines=lines, code=code, seconds=time.perf_counter() - start)


def ceilings(device: str) -> dict[str, Any]:
    """Runs `ceilings.py` in a process of its own, so that it leaves no device memory in use."""
    command = [sys.executable, Path(__file__).with_name("ceilings.py"), "--device", device]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure(
    name: str,
    bench: Bench,
    rows: Mapping[tuple[str, str], Path],
    machine: Mapping[str, Any],
    limit_s: float,
) -> Result:
    """Measures a case; `failed` or `not_measured` in the result says why there are no figures."""
    case, folder = CASES[name], bench.work / name
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [
        *bench.arguments(case),
        f"data.train={rows[case.model, case.rows]}",
        f"hydra.run.dir={folder}",
    ]
    command = [sys.executable, "-m", "qwenvl_lit.train", *arguments]
    cache = os.environ.get("QWENVL_LIT_CACHE", str(bench.work / "cache"))
    process = follow(command, limit_s, QWENVL_LIT_CACHE=cache)
    log = [line for line in read_log(folder / LOG) if "loss" in line]
    versions = written_versions(folder)
    shutil.rmtree(folder, ignore_errors=True)
    result = {
        **describe(name, bench),
        "device": machine["device"],
        "versions": versions,
        "wall_s": round(process.seconds, 1),
    }
    if process.code and process.seconds >= limit_s:
        return result | {"not_measured": f"it was ended after the {limit_s:.0f} s that were left"}
    if process.code:
        printed = [line for _, line in process.lines]
        print("\n".join(printed[-60:]))
        last = next(filter(str.strip, reversed(printed)), f"exit {process.code}")
        return result | {"failed": last[:500]}
    return result | timeline(process, log) | figures(log, machine)


def describe(name: str, bench: Bench) -> Result:
    case = CASES[name]
    what = f"{case.what}, batch {bench.batch(case)}"
    if case.batch is None:
        what = f"{case.what}, {bench.batch(case)} rows per step"
    if case.max_tokens:
        what = f"{case.what}, {bench.max_tokens(case)} tokens"
    if case.accumulate > 1:
        what += f" x {bench.accumulate(case)}"
    if case.gpus > 1:
        what += f", {case.gpus} GPUs"
    command = " ".join(["python -m qwenvl_lit.train", *bench.arguments(case), "data.train=ROWS"])
    if bench.checkpoint:
        command = command.replace(str(bench.checkpoint), "CHECKPOINT")
    return {"case": name, "what": what, "command": command}


def written_versions(folder: Path) -> dict[str, Any]:
    """Returns the versions that a run wrote; none if it failed before."""
    file = folder / FILENAME
    if not file.exists():
        return {}
    versions = json.loads(file.read_text())
    del versions["command"]  # the case has it without machine paths
    return versions


def timeline(process: Finished, log: Log) -> dict[str, float]:
    """Seconds before the measured steps.

    The first step includes compilation; there may be more of it during the warm-up.
    """
    first_step = process.time_of("step 1/") or 0.0
    training_start = first_step - log[0]["elapsed_s"]
    seconds = {
        "start_s": training_start,
        "first_step_s": log[0]["elapsed_s"],
        "warm_up_s": split_log(log)[0]["elapsed_s"],
    }
    cache_start = process.time_of("Vision cache:")
    if cache_start is not None:
        # Part of `start_s`; short if an earlier case has filled the cache
        seconds["vision_pass_s"] = training_start - cache_start
    return {key: round(value, 1) for key, value in seconds.items()}


class Record:
    """The results, written to a file after each case."""

    def __init__(self, file: Path | None, bench: Bench):
        self.file, self.bench = file, bench
        stored = json.loads(file.read_text()) if file and file.exists() else {}
        self.ceilings: dict[str, Any] = stored.get("ceilings", {})  # by device
        self.results: dict[str, Result] = {}
        for result in stored.get("results", ()):
            if result["case"] in CASES and "samples_per_second" in result:
                self.results[result["case"]] = result

    def measured(self, name: str) -> bool:
        return "samples_per_second" in self.results.get(name, {})

    def add(self, result: Result) -> None:
        """Adds a result; one without figures never replaces one with figures."""
        if "samples_per_second" in result or not self.measured(result["case"]):
            self.results[result["case"]] = result
        self.write()

    def content(self) -> dict[str, Any]:
        command = f"python scripts/bench_train.py {record_option(self.file, 'train.json')}"
        model = "Qwen-VL of 9.66 B parameters unless a case says otherwise, bfloat16"
        if self.bench.size == "small":
            command += f" --size small --device {self.bench.device}"
            model = "the demo's network, float32"
        lengths = self.bench.lengths()
        rows = (
            f"JPEGs of 640 x 480; {lengths.even} tokens per row with an image, "
            f"{lengths.supervised} supervised; mixed: {lengths.mixed[0]} to {lengths.mixed[1]} "
            f"tokens, 0 to {lengths.most_images} images"
        )
        judged = judge(self.results)
        results = []
        for name in CASES:
            result = judged.get(name) or {**describe(name, self.bench), "not_measured": "not yet"}
            if "samples_per_second" not in result:
                result["measure_with"] = f"{command} --cases {name}"
            results.append(result)
        return {
            "command": command,
            "model": model,
            "rows": rows,
            "note": NOTE,
            "ceilings": self.ceilings,
            "results": results,
        }

    def write(self) -> None:
        if self.file:
            write_record(self.file, self.content())


def sweep(names: Sequence[str], bench: Bench, record: Record, limit_s: float) -> None:
    """Measures the cases one after the other, as far as the time allows."""
    end = time.perf_counter() + limit_s
    machine = ceilings(bench.device)
    print(json.dumps(machine), flush=True)
    record.ceilings[machine["device"]] = machine
    possible = [name for name in names if bench.device != "cpu" or CASES[name].needs != "gpu"]
    rows: dict[tuple[str, str], Path] = {}
    if possible:
        rows = bench.write_rows([CASES[name] for name in possible])
    for name in names:
        left, needed = end - time.perf_counter(), CASES[name].seconds
        if name not in possible:
            record.add({**describe(name, bench), "not_measured": "it needs a GPU"})
        elif bench.size == "full" and left < needed:
            reason = f"{left:.0f} s were left, it takes about {needed}"
            record.add({**describe(name, bench), "not_measured": reason})
        else:
            record.add(measure(name, bench, rows, machine, left))
        print(summary(judge(record.results)[name]), flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*GROUPS, *CASES]
    parser.add_argument(
        "--cases",
        nargs="*",
        choices=names,
        default=["one_gpu"],
        metavar="NAME",
        help=f"groups and cases: {', '.join(names)}; default: one_gpu",
    )
    parser.add_argument(
        "--only-missing", action="store_true", help="skip cases that the record has figures for"
    )
    parser.add_argument(
        "--limit-s", type=float, default=86_400, help="skip cases that would end later than this"
    )
    parser.add_argument(
        "--steps", type=int, help="measured optimizer steps; default: 60, fewer if accumulated"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a model folder, for example from scripts/make_checkpoint.py; default: random weights",
    )
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="number of distinct images")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("/tmp/bench_train"),
        help="folder for rows, runs and caches",
    )
    parser.add_argument("--record", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("extra", nargs="*", help="more arguments for every run, after --")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    bench = Bench(
        size=arguments.size,
        device=arguments.device,
        checkpoint=arguments.checkpoint,
        workers=arguments.workers,
        images=arguments.images,
        steps=arguments.steps,
        work=arguments.work,
        extra=tuple(arguments.extra),
    )
    record = Record(arguments.record, bench)
    chosen: dict[str, None] = {}  # an ordered set of the names of cases
    for name in arguments.cases:
        chosen |= dict.fromkeys(GROUPS.get(name, [name]))
    names = [name for name in chosen if not (arguments.only_missing and record.measured(name))]
    if names:
        sweep(names, bench, record, arguments.limit_s)
    record.write()
    if arguments.plot:
        from plot_train import draw

        draw(record.content(), arguments.plot)


if __name__ == "__main__":
    main()
