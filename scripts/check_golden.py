"""Compare this package with values that the original Qwen-VL-Chat, its scripts and ms-swift produced.

    python scripts/check_golden.py tests/golden
    python scripts/check_golden.py FOLDER --record benchmarks/golden.json    # and write the table down
    python scripts/check_golden.py --table benchmarks/golden.json            # the tables of the README

One line per file: cases that agree of cases compared, how many differ on purpose, and the largest deviation of each kind of value with
what is allowed. Any part of such a folder will do: what is there is checked. What differs on purpose, our exact result there, and why,
stands in `deviations.json` (the folder's own, or that of tests/golden). The exit status is 1 if a case misses, if a stated deviation is
none, or if a file cannot be read or is not known.

Files ending in `_qwen.json` need the published vocabulary, which the PyPI package `dashscope` ships.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tests")
)  # what compares the values stands in tests/parity

from parity import boxes, chat, network, scores, text
from parity.result import Result, UnreadableError, read
from transformers.utils.logging import disable_progress_bar

OUR_DEVIATIONS = Path(__file__).parent.parent / "tests" / "golden" / "deviations.json"
CHECKS: dict[str, Callable[[Path], Iterator[Result]]] = (
    network.CHECKS | text.CHECKS | chat.CHECKS | boxes.CHECKS | scores.CHECKS
)
READ_BY_OTHERS = (
    "README.md",
    "*/README.md",
    "deviations.json",
    "model/config.json",
    "model/images/*",
    "tokenizer/synthetic.tiktoken",
)

Listed = dict[str, dict[str, Any]]  # case -> {"ours": our exact result, "why": ...}


@dataclass
class Report:
    """What became of the cases of a file."""

    file: str
    passed: int = 0
    listed: int = 0  # differ as `deviations.json` says
    missed: list[str] = field(default_factory=list)  # what is wrong, case by case
    largest: dict[str, Result] = field(
        default_factory=dict
    )  # kind of value -> the worst of the cases that agree
    results: list[Result] = field(default_factory=list)

    @property
    def compared(self) -> int:
        return self.passed + self.listed + len(self.missed)

    def __str__(self) -> str:
        text = f"{'MISS' if self.missed else 'ok  '} {self.file}: {self.passed} of {self.compared} cases agree"
        if self.listed:
            text += f", {self.listed} differ on purpose"
        text += "; " * bool(self.largest) + ", ".join(
            spoken(of, r.deviation, r.allowed) for of, r in self.largest.items()
        )
        return "".join((text, *(f"\n       {miss}" for miss in self.missed)))


def spoken(of: str, deviation: float, allowed: float) -> str:
    return (
        f"{of} {deviation:.1e} of {allowed:.0e}".replace("0.0e+00", "0")
        if allowed
        else f"{of} exact"
    )


def check(path: Path, folder: Path, listed: Listed) -> Report:
    """Compare one file of a folder, for which `listed` says what differs on purpose."""
    file = path.relative_to(folder).as_posix()
    report = Report(file)
    compare = next(compare for pattern, compare in CHECKS.items() if fnmatchcase(file, pattern))
    try:
        report.results = list(compare(path))
        expected = len(read(path).get("cases", ())) if path.suffix == ".json" else 0
    except (
        UnreadableError,
        KeyError,
        OSError,
    ) as fault:  # of its own, or of an image or weights that it needs
        report.missed.append(f"cannot be compared: {type(fault).__name__}: {fault}")
        return report
    seen: set[str] = set()
    for case, group in groupby(report.results, key=lambda result: result.case):
        if case in seen:
            report.missed.append(f"{case}: comes twice")
        seen.add(case)
        _count(report, case, list(group), listed.get(case))
    report.missed += [
        f"{case}: is listed as a deviation, but is no case" for case in listed.keys() - seen
    ]
    if len(seen) < max(expected, 1):
        report.missed.append(f"{len(seen)} cases were compared, but there are {expected}")
    return report


def _count(report: Report, case: str, results: list[Result], listed: dict[str, Any] | None) -> None:
    wrong = [result for result in results if not result.passed]
    if listed is None and not wrong:
        report.passed += 1
    elif listed is None:
        said = ", ".join(
            f"{r.of} {r.deviation:.2g} of {r.allowed:.0e}" if r.allowed else f"other {r.of}"
            for r in wrong
        )
        report.missed.append(
            f"{case}: {said}" + "".join(f"; ours {r.ours}" for r in wrong if r.ours is not None)
        )
    elif not wrong:
        report.missed.append(f"{case}: is listed as a deviation, but agrees")
    elif [result.ours for result in wrong] != [listed["ours"]]:
        report.missed.append(
            f"{case}: differs, but not as listed; ours {[result.ours for result in wrong]}, listed {listed['ours']}"
        )
    else:
        report.listed += 1
    for result in results:
        if result.passed and (
            result.of not in report.largest
            or result.deviation > report.largest[result.of].deviation
        ):
            report.largest[result.of] = result


def files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files to compare, and those that nobody knows."""
    found: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(fnmatchcase(name, pattern) for pattern in CHECKS):
            found[0].append(path)
        elif not any(fnmatchcase(name, pattern) for pattern in READ_BY_OTHERS):
            found[1].append(path)
    return found


def deviations(folder: Path) -> dict[str, Listed]:
    own = folder / "deviations.json"
    return read(own if own.exists() else OUR_DEVIATIONS)


# -- a record of it, and its tables -----------------------------------------------------------------------------------------------


def record(reports: Iterable[Report], folder: Path) -> dict[str, Any]:
    return {
        "command": f"python scripts/check_golden.py {folder.resolve().name}",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "files": [
            {
                "file": report.file,
                "cases": report.compared,
                "agree": report.passed,
                "differ_on_purpose": report.listed,
                "largest": {
                    of: {"deviation": r.deviation, "allowed": r.allowed}
                    for of, r in report.largest.items()
                },
            }
            for report in reports
        ],
    }


ROWS = {  # of the README's table -> the files that it sums up
    "names, shapes and values of all parameters": (
        "model/param_shapes.json",
        "model/model.safetensors*",
    ),
    "images of 13 kinds to pixels": ("model/preprocess*",),
    "the vision tower, stage by stage, at 112, 224 and 448 px": (
        "model/vision_*",
        "model/init_pos_embed.safetensors",
    ),
    "text, one and three images": (
        "model/case_text.*",
        "model/case_one_image.*",
        "model/case_three_images.*",
    ),
    "batches padded on the left and on the right": ("model/case_batch_*",),
    "around `seq_length`: dynamic NTK and log-n, in one pass": (
        "model/case_long_eval_*",
        "model/case_long_train*",
    ),
    "the same, token by token with a cache": ("model/case_long_incremental_*",),
    "loss and gradients of every parameter": ("model/case_train_*", "model/case_eval_loss_*"),
    "six AdamW steps, three recipes": ("model/train_steps.json",),
    "bfloat16": ("model/case_bf16_*",),
    "tables of NTK, log-n and rotary angles": (
        "model/ntk_alpha.json",
        "model/rotary.*",
        "model/logn_*",
        "model/cases.json",
    ),
    "greedy decoding": ("model/generation.json",),
    "`chat()` from end to end": ("model/chat.json",),
    "text to ids and back, two vocabularies": ("tokenizer/*",),
    "prompts, windows, stop words, answers": (
        "chat/make_context_*",
        "chat/decode_tokens_*",
        "chat/stop_words_*",
    ),
    "training samples: ids and labels, both supervision modes": ("chat/train_*",),
    "boxes: rows, frames, answers, IoU": ("grounding/*", "metrics/grounding_iou.json"),
    "captions to words; CIDEr, BLEU, ROUGE-L": ("metrics/captions*.json",),
    "VQA accuracy, ANLS, relaxed accuracy, exact match, GQA": ("metrics/*.json",),
}


def table(recorded: dict[str, Any]) -> str:
    """The README's table of a record, in markdown."""
    lines = [
        "| | cases | agree | differ on purpose | largest deviation of what is allowed; all else exact |",
        "|---|---|---|---|---|",
    ]
    left = {entry["file"]: entry for entry in recorded["files"]}
    total = [
        sum(entry[key] for entry in left.values())
        for key in ("cases", "agree", "differ_on_purpose")
    ]
    for row, patterns in ROWS.items():
        entries = [
            left.pop(name)
            for name in sorted(left)
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        counts = [
            sum(entry[key] for entry in entries) for key in ("cases", "agree", "differ_on_purpose")
        ]
        worst: dict[str, dict[str, float]] = {}
        for entry in entries:
            for of, found in entry["largest"].items():
                if of not in worst or found["deviation"] > worst[of]["deviation"]:
                    worst[of] = found
        said = [
            spoken(of, found["deviation"], found["allowed"])
            for of, found in worst.items()
            if found["allowed"]
        ]
        lines.append(f"| {row} | {' | '.join(map(str, counts))} | {', '.join(said) or 'exact'} |")
    if left:
        raise ValueError(f"no row of the table sums up {', '.join(left)}; add them to ROWS")
    return "\n".join([*lines, f"| **all** | {' | '.join(f'**{count}**' for count in total)} | |"])


def deviations_table(listed: dict[str, Listed]) -> str:
    """The README's table of what differs on purpose: cases by reason, in markdown."""
    counts, where = Counter(), defaultdict(dict)
    for file, cases in listed.items():
        for entry in cases.values():
            counts[entry["why"]] += 1
            where[entry["why"]][re.sub("_(qwen|synthetic)$", "", Path(file).stem)] = True
    rows = [
        f"| {_in_code(why)} | {', '.join(where[why])} | {count} |"
        for why, count in counts.most_common()
    ]
    return "\n".join(["| what ours does, and why | files | cases |", "|---|---|---|", *rows])


def _in_code(text: str) -> str:
    """Names of special tokens as code, which a cell of a table can hold."""
    return re.sub("<[^>]+>", lambda name: f"`{name.group()}`".replace("|", "\\|"), text)


def main(folder: Path, *, every_case: bool = False, written: Path | None = None) -> int:
    """Prints the report of every file and a total; returns how many things are wrong."""
    disable_progress_bar()
    compared, unknown = files(folder)
    listed = deviations(folder)
    reports = []
    for path in compared:
        report = check(path, folder, listed.get(path.relative_to(folder).as_posix(), {}))
        reports.append(report)
        print(report)
        for result in report.results if every_case else ():
            print(
                f"       {'ok  ' if result.passed else 'not '} {result.case}: {spoken(result.of, result.deviation, result.allowed)}"
            )
    for path in unknown:
        print(f"MISS {path.relative_to(folder).as_posix()}: no comparison knows this file")
    if not compared:
        print(
            f"MISS {folder}: there is nothing to compare; expected model/, tokenizer/, chat/, grounding/ or metrics/ in it"
        )
    wrong = sum(len(report.missed) for report in reports) + len(unknown) + (not compared)
    print(
        f"{len(reports)} files, {sum(report.compared for report in reports)} cases: {sum(report.passed for report in reports)} agree, "
        f"{sum(report.listed for report in reports)} differ on purpose, {wrong} wrong"
    )
    if written and not wrong:
        recorded = record(reports, folder)
        head, entries = (
            {**recorded, "files": []},
            (json.dumps(entry, ensure_ascii=False) for entry in recorded["files"]),
        )
        lines = json.dumps(head, indent=1, ensure_ascii=False).replace(
            '"files": []', '"files": [\n  ' + ",\n  ".join(entries) + "\n ]"
        )
        written.write_text(lines + "\n", encoding="utf-8")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--cases", action="store_true", help="print every comparison")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the result down, if nothing is wrong"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print a written result as tables"
    )
    options = parser.parse_args()
    if (options.folder is None) == (options.table is None):
        parser.error("give a folder, or --table and a written result")
    if options.table:
        print(table(read(options.table)), deviations_table(read(OUR_DEVIATIONS)), sep="\n\n")
        sys.exit()
    sys.exit(bool(main(options.folder, every_case=options.cases, written=options.record)))
