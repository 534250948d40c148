"""Compares this package with results of the original Qwen-VL-Chat, its scripts and ms-swift.

    python scripts/check_golden.py tests/golden
    python scripts/check_golden.py FOLDER --record benchmarks/golden.json    # and write a record
    python scripts/check_golden.py --table benchmarks/golden.json    # the tables of docs/parity.md

Prints a line for each file: the cases that agree, of those compared; how many differ on purpose;
and the largest deviation of each kind of value with its limit. FOLDER may be any folder in the
format of tests/golden, or a part of one.

Cases that differ on purpose are listed in the folder's `deviations.json`, with our exact result and
the reason. In a folder without this file, the list of tests/golden is used, and a case that is not
in it may differ if a rule in tests/parity/reasons.py explains the recorded value.

The exit status is 1 if a case misses, if a listed deviation does not exist, or if a file cannot be
read or is unknown. Files ending in `_qwen.json` need the published vocabulary, which the PyPI
package `dashscope` has.
"""

from __future__ import annotations

import argparse
import json
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

# The comparisons are in tests/parity.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from parity import boxes, chat, network, scores, text
from parity.result import Result, UnreadableError, read
from transformers.utils.logging import disable_progress_bar

from qwenvl_lit.runs.versions import versions

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
# Errors of a comparison if a file lacks a key, or has a value that is not in the format; the first
# is raised by the comparison itself.
NOT_COMPARABLE = (
    UnreadableError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

Listed = dict[str, dict[str, Any]]  # case -> {"ours": our exact result, "why": ...}


@dataclass(frozen=True)
class Deviations:
    """The cases that may differ on purpose, by file.

    Args:
        strict: every listed case must exist and differ, and no other case may differ. If False,
            the list is that of another folder, and rules explain further cases.
    """

    by_file: dict[str, Listed]
    strict: bool = True


@dataclass
class Report:
    """The comparison of a file."""

    file: str
    passed: int = 0
    explained: int = 0  # cases that differ on purpose
    missed: list[str] = field(default_factory=list)  # faults, one a case
    largest: dict[str, Result] = field(default_factory=dict)  # by kind of value, of those in limits
    results: list[Result] = field(default_factory=list)

    @property
    def compared(self) -> int:
        return self.passed + self.explained + len(self.missed)

    def __str__(self) -> str:
        verdict = "MISS" if self.missed else "ok  "
        line = f"{verdict} {self.file}: {self.passed} of {self.compared} cases agree"
        if self.explained:
            line += f", {self.explained} differ on purpose"
        if self.largest:
            kinds = [limit_text(of, r.deviation, r.allowed) for of, r in self.largest.items()]
            line += f"; {', '.join(kinds)}"
        return "\n       ".join((line, *self.missed))


def limit_text(of: str, deviation: float, allowed: float) -> str:
    if not allowed:
        return f"{of} exact"
    return f"{of} {deviation:.1e} (limit {allowed:.0e})".replace("0.0e+00", "0")


def check(path: Path, folder: Path, deviations: Deviations) -> Report:
    """Compares one file of a folder."""
    file = path.relative_to(folder).as_posix()
    listed = deviations.by_file.get(file, {})
    report = Report(file)
    compare = next(compare for pattern, compare in CHECKS.items() if fnmatchcase(file, pattern))
    expected = 1
    try:
        if path.suffix == ".json":
            expected = max(expected, len(read(path).get("cases", ())))
        for result in compare(path):
            report.results.append(result)
    except NOT_COMPARABLE as error:
        # An error of the file, or of an image or of weights that it needs. The cases before it
        # have been compared.
        last = f" after {report.results[-1].case}" if report.results else ""
        report.missed.append(f"cannot be compared{last}: {type(error).__name__}: {error}")
    seen: set[str] = set()
    for case, group in groupby(report.results, key=lambda result: result.case):
        if case in seen:
            report.missed.append(f"{case}: comes twice")
        seen.add(case)
        _count(report, case, list(group), listed.get(case), strict=deviations.strict)
    if report.missed and report.missed[0].startswith("cannot be compared"):
        return report
    if deviations.strict:
        for case in sorted(listed.keys() - seen):
            report.missed.append(f"{case}: is listed as a deviation, but is no case")
    if len(seen) < expected:
        report.missed.append(f"{len(seen)} cases were compared, but there are {expected}")
    return report


def _count(
    report: Report,
    case: str,
    results: list[Result],
    listed: dict[str, Any] | None,
    *,
    strict: bool,
) -> None:
    wrong = [result for result in results if not result.passed]
    as_listed = listed is not None and [result.ours for result in wrong] == [listed["ours"]]
    by_rule = not strict and all(result.reason for result in wrong)
    if not wrong and not (strict and listed):
        report.passed += 1
    elif not wrong:
        report.missed.append(f"{case}: is listed as a deviation, but agrees")
    elif as_listed or by_rule:
        report.explained += 1
    elif listed is None:
        report.missed.append(f"{case}: {_faults(wrong)}")
    else:
        ours = [result.ours for result in wrong]
        report.missed.append(
            f"{case}: differs, but not as listed; ours {ours}, listed {listed['ours']}"
        )
    for result in results:
        largest = report.largest.get(result.of)
        if result.passed and (largest is None or result.deviation > largest.deviation):
            report.largest[result.of] = result


def _faults(wrong: list[Result]) -> str:
    faults, values = [], ""
    for result in wrong:
        if result.allowed:
            faults.append(f"{result.of} {result.deviation:.2g} of {result.allowed:.0e}")
        else:
            faults.append(f"other {result.of}")
        if result.ours is not None:
            values += f"; ours {result.ours}"
    return ", ".join(faults) + values


def files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files to compare, and the unknown files."""
    known, unknown = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(fnmatchcase(name, pattern) for pattern in CHECKS):
            known.append(path)
        elif not any(fnmatchcase(name, pattern) for pattern in READ_BY_OTHERS):
            unknown.append(path)
    return known, unknown


def deviations_of(folder: Path) -> Deviations:
    own = folder / "deviations.json"
    if own.exists():
        return Deviations(read(own))
    return Deviations(read(OUR_DEVIATIONS), strict=False)


# -- a record and its tables ----------------------------------------------------------------------


def record(reports: Iterable[Report], folder: Path) -> dict[str, Any]:
    entries = []
    for report in reports:
        largest = {
            of: {"deviation": result.deviation, "allowed": result.allowed}
            for of, result in report.largest.items()
        }
        entry = {"file": report.file, "cases": report.compared, "agree": report.passed}
        entries.append({**entry, "differ_on_purpose": report.explained, "largest": largest})
    return {
        "command": f"python scripts/check_golden.py {folder.resolve().name}",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "files": entries,
    }


def write_record(file: Path, recorded: dict[str, Any]) -> None:
    """Writes a record with one line for each compared file."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in recorded["files"]]
    head = json.dumps({**recorded, "files": []}, indent=1, ensure_ascii=False)
    entries = '"files": [\n  ' + ",\n  ".join(lines) + "\n ]"
    file.write_text(head.replace('"files": []', entries) + "\n", encoding="utf-8")


ROWS = {  # row of the table in docs/parity.md -> the files that it sums up
    "names, shapes and values of all parameters": (
        "model/param_shapes.json",
        "model/model.safetensors*",
    ),
    "preprocessing of 13 kinds of images": ("model/preprocess*",),
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
    "lengths around `seq_length` (dynamic NTK, log-n), in one forward pass": (
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
    "prompts, context windows, stop words, answers": (
        "chat/make_context_*",
        "chat/decode_tokens_*",
        "chat/stop_words_*",
    ),
    "training samples: ids and labels, both supervision modes": ("chat/train_*",),
    "boxes: rows, frames, answers, IoU": ("grounding/*", "metrics/grounding_iou.json"),
    "captions to words; CIDEr, BLEU, ROUGE-L": ("metrics/captions*.json",),
    "VQA accuracy, ANLS, relaxed accuracy, exact match, GQA": ("metrics/*.json",),
}


COUNTS = ("cases", "agree", "differ_on_purpose")


def table(recorded: dict[str, Any]) -> str:
    """Returns a record as the Markdown table of docs/parity.md."""
    lines = [
        "| | cases | agree | differ on purpose | largest deviation (limit); all else equal |",
        "|---|---|---|---|---|",
    ]
    left = {entry["file"]: entry for entry in recorded["files"]}
    total = _sums(left.values())
    for row, patterns in ROWS.items():
        names = [name for name in sorted(left) if _matches(name, patterns)]
        entries = [left.pop(name) for name in names]
        counts = " | ".join(map(str, _sums(entries)))
        lines.append(f"| {row} | {counts} | {_largest(entries)} |")
    if left:
        raise ValueError(f"no row of the table sums up {', '.join(left)}; add them to ROWS")
    bold = " | ".join(f"**{count}**" for count in total)
    return "\n".join([*lines, f"| **all** | {bold} | |"])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sums(entries: Iterable[dict[str, Any]]) -> list[int]:
    counts = dict.fromkeys(COUNTS, 0)
    for entry in entries:
        for key in COUNTS:
            counts[key] += entry[key]
    return list(counts.values())


def _largest(entries: Iterable[dict[str, Any]]) -> str:
    """Returns the largest deviation of each kind of value that has a limit."""
    largest: dict[str, dict[str, float]] = {}
    for entry in entries:
        for of, result in entry["largest"].items():
            if of not in largest or result["deviation"] > largest[of]["deviation"]:
                largest[of] = result
    texts = []
    for of, result in largest.items():
        if result["allowed"]:
            texts.append(limit_text(of, result["deviation"], result["allowed"]))
    return ", ".join(texts) or "exact"


def deviations_table(by_file: dict[str, Listed]) -> str:
    """Returns the listed cases by reason, as the Markdown table of docs/parity.md."""
    counts: Counter[str] = Counter()
    where: defaultdict[str, dict[str, bool]] = defaultdict(dict)
    for file, cases in by_file.items():
        for entry in cases.values():
            counts[entry["why"]] += 1
            where[entry["why"]][re.sub("_(qwen|synthetic)$", "", Path(file).stem)] = True
    rows = ["| deviation | golden files | cases |", "|---|---|---|"]
    for why, count in counts.most_common():
        rows.append(f"| {_in_code(why)} | {', '.join(where[why])} | {count} |")
    return "\n".join(rows)


def _in_code(text: str) -> str:
    """Marks names of special tokens as code, in a form that a cell of a table can hold."""
    return re.sub("<[^>]+>", lambda name: f"`{name.group()}`".replace("|", "\\|"), text)


def main(folder: Path, *, every_case: bool = False, written: Path | None = None) -> int:
    """Prints the report of every file and a total; returns the number of faults."""
    disable_progress_bar()
    compared, unknown = files(folder)
    deviations = deviations_of(folder)
    reports = []
    for path in compared:
        report = check(path, folder, deviations)
        reports.append(report)
        print(report)
        for result in report.results if every_case else ():
            verdict = "ok  " if result.passed else "not "
            limit = limit_text(result.of, result.deviation, result.allowed)
            print(f"       {verdict} {result.case}: {limit}")
    for path in unknown:
        print(f"MISS {path.relative_to(folder).as_posix()}: no comparison knows this file")
    if not compared:
        print(
            f"MISS {folder}: there is nothing to compare; "
            f"expected model/, tokenizer/, chat/, grounding/ or metrics/ in it"
        )
    wrong = sum(len(report.missed) for report in reports) + len(unknown) + (not compared)
    cases = sum(report.compared for report in reports)
    agree = sum(report.passed for report in reports)
    explained = sum(report.explained for report in reports)
    print(
        f"{len(reports)} files, {cases} cases: {agree} agree, {explained} differ on purpose, "
        f"{wrong} wrong"
    )
    if written and not wrong:
        write_record(written, record(reports, folder))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--cases", action="store_true", help="print every comparison")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the result, if nothing is wrong"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a record as tables")
    options = parser.parse_args()
    if (options.folder is None) == (options.table is None):
        parser.error("give a folder, or --table and a record")
    if options.table:
        print(table(read(options.table)), deviations_table(read(OUR_DEVIATIONS)), sep="\n\n")
        sys.exit()
    sys.exit(bool(main(options.folder, every_case=options.cases, written=options.record)))
