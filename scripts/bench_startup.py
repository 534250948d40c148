"""Measures how long commands take from Enter to the first line, step and answer.

    python scripts/bench_startup.py --record benchmarks/startup.json
    python scripts/bench_startup.py --commands train predict chat --train speed=compiled \\
        --model model=qwen_vl_chat model.weights=random model.vocabulary=tiny

Each command runs in a process of its own, with the small model of the demo or that of `--model`, on
the demo's rows. `predict` and `chat` answer with untrained weights. Files and caches are warm: the
first run of a case is not counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import IO, Any

from records import write_record

from qwenvl_lit.runs.versions import versions

IMPORTS = {  # name -> statement
    "torch": "import torch",
    "torch, transformers": "import torch, transformers",
    "a model of transformers, and lightning": "import torch, lightning; "
    "from transformers import GenerationMixin, PreTrainedModel",
    "the libraries in a command": "from qwenvl_lit.libraries import import_libraries; "
    "import_libraries()",
    "qwenvl_lit.build": "import qwenvl_lit.build",
    "qwenvl_lit.build in a command": "from qwenvl_lit.libraries import import_libraries; "
    "import_libraries(); import qwenvl_lit.build",
    "QwenVL": "from qwenvl_lit import QwenVL",
}
MODULE = "qwenvl_lit.training.module:VisionLanguageModule"
ANSWERS = {"module": "qwenvl_lit.build:module", "weights": f"{MODULE}.configure_model"}
PHASES = {  # by command: name -> module:function; a phase may be part of another
    "check": {"data": "qwenvl_lit.build:data", "rows": "qwenvl_lit.data.inspection:inspect"},
    "train": {
        "module": "qwenvl_lit.build:module",
        "data": "qwenvl_lit.build:data",
        "trainer": "qwenvl_lit.build:trainer",
        "memory_estimate": "qwenvl_lit.cli.memory_check:check_memory",
        "rows": "qwenvl_lit.data.datamodule:DataModule.setup",
        "weights": f"{MODULE}.configure_model",
        "optimizer": f"{MODULE}.configure_optimizers",
    },
    "predict": {**ANSWERS, "trainer": "qwenvl_lit.build:trainer"},
    "chat": ANSWERS,
}
MOMENTS = {  # the end of the first call
    "train": {"first_step": f"{MODULE}.on_train_batch_end"},
    "predict": {"first_answer": f"{MODULE}.predict"},
}
QUESTION = "What is in the picture?"
NOTE = (
    "medians in seconds; counted from the start of the process: config (composed), first_line, "
    "first_step, first_answer and end; all others are durations: cpu of the whole process with its "
    "workers, libraries the imports of torch, transformers and Lightning, modules those of this "
    "package"
)


@dataclass(frozen=True)
class Case:
    """A command whose start is measured."""

    command: str
    arguments: tuple[str, ...] = ()
    question: str = ""  # its standard input


def cases(model: Sequence[str], train: Sequence[str] = ()) -> dict[str, Case]:
    """Returns the measured commands by name.

    Args:
        model: arguments of all commands that choose a model.
        train: further arguments of `train`.
    """
    steps = ("trainer.max_steps=2", "data.validation=null", "~callbacks.samples", *train)
    # The demo's model without a run; other models bring their own adapter.
    answers = (*(model or ["model=qwen_vl_tiny"]), "generation.max_new_tokens=8")
    return {
        "--help": Case("train", ("--help",)),
        "check": Case("check", tuple(model)),
        "train": Case("train", (*model, *steps)),
        "predict": Case("predict", (*answers, f"prompt={QUESTION}")),
        "chat": Case("chat", answers, question=f"{QUESTION}\n"),
    }


def measure_command(case: Case, folder: Path) -> dict[str, float]:
    """Runs a command in `folder`, with its caches there; returns moments and durations."""
    marks, writing = os.pipe()
    line = [sys.executable, __file__, "--marked", str(writing), case.command, *case.arguments]
    start = time.time()
    process = subprocess.Popen(
        line,
        cwd=folder,
        env={**os.environ, "QWENVL_LIT_CACHE": str(folder / "cache")},
        pass_fds=[writing],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    printed, errors = Output(process.stdout), Output(process.stderr)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(case.question)
    status = process.wait()
    end = time.time()
    printed.join()
    errors.join()
    if status:
        raise RuntimeError(f"{' '.join(line)} ended with status {status}:\n{errors.text}")
    moments, durations = {"end": end}, {}
    first_lines = [output.first_line for output in (printed, errors) if output.first_line]
    if first_lines:
        moments["first_line"] = min(first_lines)
    if case.question and printed.first_line:
        moments["first_answer"] = printed.first_line
    with os.fdopen(marks) as stream:
        for kind, name, value in map(json.loads, stream):
            (moments if kind == "moment" else durations)[name] = value
    return {name: moment - start for name, moment in moments.items()} | durations


class Output(threading.Thread):
    """Reads a stream to its end, and notes when its first line came."""

    def __init__(self, stream: IO[str] | None):
        super().__init__()
        assert stream is not None
        self.stream = stream
        self.text = ""
        self.first_line: float | None = None
        self.start()

    def run(self) -> None:
        with self.stream:
            for line in self.stream:
                self.first_line = self.first_line or time.time()
                self.text += line


def measure_import(statement: str) -> dict[str, float]:
    """Measures an import in a process, and the whole process."""
    script = (
        f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    )
    start = time.time()
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return {"import": float(output.stdout), "end": time.time() - start}


def medians(measure: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    """Returns the medians of several measurements, after one that warms files and caches."""
    measure()
    measured = []
    for _ in range(repeats):
        before = _cpu_seconds()
        result = measure()
        measured.append(result | {"cpu": _cpu_seconds() - before})
    names = measured[0]
    values = {name: [result[name] for result in measured] for name in names}
    return {name: round(statistics.median(of_name), 2) for name, of_name in values.items()}


def _cpu_seconds() -> float:
    """CPU time of the processes that have ended; a busy machine changes it less than the time."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Marks:
    """Writes moments and durations of a command to a pipe, as lines of JSON."""

    def __init__(self, descriptor: int):
        self._pipe = os.fdopen(descriptor, "w", buffering=1)
        self._written: set[str] = set()

    def close(self) -> None:
        self._pipe.close()

    def moment(self, name: str) -> None:
        self._write("moment", name, time.time())

    def duration(self, name: str, seconds: float) -> None:
        self._write("duration", name, seconds)

    def _write(self, kind: str, name: str, value: float) -> None:
        if name not in self._written:
            self._written.add(name)
            print(json.dumps([kind, name, value]), file=self._pipe)

    def wrap(self, kind: str, name: str, target: str) -> None:
        """Lets a function mark the duration, or the end, of its first call."""
        module, _, path = target.partition(":")
        *owners, attribute = path.split(".")
        owner: Any = importlib.import_module(module)
        for owner_name in owners:
            owner = getattr(owner, owner_name)
        work = getattr(owner, attribute)

        @wraps(work)
        def marked(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = work(*arguments, **options)
            _synchronize()
            if kind == "moment":
                self.moment(name)
            else:
                self.duration(name, time.perf_counter() - start)
            return result

        setattr(owner, attribute, marked)


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run_marked(descriptor: int, name: str, arguments: Sequence[str]) -> None:
    """Runs a command in this process, which marks its phases."""
    marks = Marks(descriptor)
    os.set_inheritable(descriptor, False)  # workers would keep the pipe open
    commands = importlib.import_module("qwenvl_lit.cli.command")
    run_command = commands.command

    def marked_command(name: str, main: Callable[..., None], **options: Any) -> None:
        def marked_main(config: Any) -> None:
            libraries.import_libraries()
            start = time.perf_counter()
            for phase, target in PHASES.get(name, {}).items():
                marks.wrap("duration", phase, target)
            for moment, target in MOMENTS.get(name, {}).items():
                marks.wrap("moment", moment, target)
            marks.duration("modules", time.perf_counter() - start)
            main(config)

        marked_main.__module__ = main.__module__
        run_command(name, marked_main, **options)

    commands.command = marked_command
    marks.wrap("moment", "config", "qwenvl_lit.cli.command:check_packages")
    libraries = importlib.import_module("qwenvl_lit.libraries")
    marks.wrap("duration", "libraries", "qwenvl_lit.libraries:import_libraries")
    sys.argv = [name, *arguments]
    runpy.run_module(f"qwenvl_lit.{name}", run_name="__main__", alter_sys=True)


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commands", nargs="*", default=list(cases(())), choices=list(cases(())))
    parser.add_argument("--imports", nargs="*", default=list(IMPORTS), choices=list(IMPORTS))
    parser.add_argument("--model", nargs="+", default=[], help="arguments of all commands")
    parser.add_argument("--train", nargs="+", default=[], help="arguments of train only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", type=Path)
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--marked"]:  # a process that is measured
        run_marked(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    arguments = parse_arguments()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    results: dict[str, dict[str, float]] = {}
    for name in arguments.imports:
        statement = IMPORTS[name]
        results[f"import {name}"] = medians(partial(measure_import, statement), arguments.repeats)
        print(f"import {name}", json.dumps(results[f"import {name}"]), flush=True)
    known = cases(arguments.model, arguments.train)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.commands:
            measure = partial(measure_command, known[name], Path(folder))
            results[name] = medians(measure, arguments.repeats)
            print(name, json.dumps(results[name]), flush=True)
    if arguments.record:
        options = f"--repeats {arguments.repeats}"
        for name, given in (("model", arguments.model), ("train", arguments.train)):
            if given:
                options += f" --{name} {' '.join(given)}"
        record = {
            "command": f"python scripts/bench_startup.py {options}",
            "device": device_name(),
            "versions": versions(),
            "note": NOTE,
            "results": results,
        }
        write_record(arguments.record, record)


if __name__ == "__main__":
    main()
