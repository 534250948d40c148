"""Writes the page of the documentation about benchmarks, from the records in benchmarks/."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[2] / "benchmarks"
# Columns of records whose results have more keys than a page is wide. The rest is in the file.
COLUMNS = {
    "train": (
        "case",
        "what",
        "device",
        "versions.torch",
        "samples_per_second",
        "tokens_per_second",
        "tflop_per_second",
        "mfu",
        "peak_memory_gib",
        "first_step_s",
        "command",
    ),
}
# Of the versions, these change results; the file has all of them.
VERSIONS = ("python", "torch", "transformers", "peft", "bitsandbytes", "qwenvl_lit", "git")
TITLES = {
    "commands": "Whole commands",
    "data": "Reading data",
    "export": "Export",
    "faults": "Faults",
    "float8": "FP8 in training",
    "four_bit": "4-bit matmuls",
    "generate": "Generation",
    "generate_qwen3_vl": "Generation, Qwen3-VL",
    "golden": "Comparison with the original code",
    "load": "Loading of checkpoints",
    "metrics": "Metrics",
    "new_classes": "Adapters on the demo",
    "resume": "Resumed runs",
    "startup": "Start of commands",
    "startup_gpu": "Start of commands, with a GPU",
    "train": "Training",
}
DEEPEST = 3  # mappings in mappings of a row that are shown
# Parts of rows that are too long, by record.
LEFT_OUT = {"float8": "runs", "resume": "losses"}
COMMIT = re.compile(r"[0-9a-f]{40}\+?$")
WIDEST = 9  # columns; a wider table is turned on its side


def benchmarks_page(folder: Path = RECORDS) -> str:
    """Returns the page: a section for each record, with its conditions and its tables."""
    parts = [
        "# Benchmarks",
        "The records in `benchmarks/`, with the command, the device and the versions of each.",
        "```\npython scripts/bench_train.py --record benchmarks/train.json\n```",
        "Programs in `scripts/` write the records. What is longer, such as the losses of each "
        "step, is in the files only.",
    ]
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        parts.append(f"## {TITLES.get(file.stem, file.stem)}")
        parts += record_parts(file.stem, record)
    return "\n\n".join(parts) + "\n"


def record_parts(name: str, record: Mapping[str, Any]) -> list[str]:
    """Returns the conditions of a record, then its tables."""
    conditions = [f"- File: `benchmarks/{name}.json`"]
    parts = []
    for key, value in record.items():
        if key == "versions":
            conditions.append(f"- Versions: {_versions(value)}")
        elif not isinstance(value, dict | list):
            text = f"`{value}`" if key == "command" else shown(value)
            conditions.append(f"- {words(key).capitalize()}: {text}")
        else:
            kept = _without(value, LEFT_OUT.get(name))
            parts += tables(words(key), kept, COLUMNS.get(name, ()))
    return ["\n".join(conditions), *parts]


def _without(value: Any, left_out: str | None) -> Any:
    if not isinstance(value, dict):
        return value
    kept = [key for key in value if key != left_out]
    return {key: _without(value[key], left_out) for key in kept}


def _versions(versions: Mapping[str, Any]) -> str:
    known = [name for name in VERSIONS if versions.get(name)]
    return ", ".join(f"{name} {shown(versions[name])}" for name in known)


def tables(title: str, value: Any, columns: Sequence[str] = ()) -> list[str]:
    """Returns the tables of a part of a record: rows by number, or by name."""
    if isinstance(value, dict) and not any(isinstance(row, dict) for row in value.values()):
        rows = [{"": words(key), title: item} for key, item in value.items() if is_short(item)]
        return [table(rows)] if rows else []
    if isinstance(value, dict):
        rows = [{"": key, **flat(row)} for key, row in value.items() if isinstance(row, dict)]
    else:
        rows = [flat(row) for row in value if isinstance(row, dict)]
        if columns:
            rows = [{name: row.get(name) for name in columns} for row in rows]
    return [f"**{title}**", table(rows)] if rows else []


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a row, those of mappings with dotted names, without lists."""
    values: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict) and prefix.count(".") < DEEPEST:
            inner = {name: value[name] for name in VERSIONS if name in value}
            values |= flat(inner if key == "versions" else value, f"{prefix}{key}.")
        elif is_short(value):
            values[prefix + key] = value
        elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, 1):
                values |= flat(item, f"{prefix}{key} {number}: ")
    return values


def is_short(value: Any) -> bool:
    """Whether a value fits into a cell: no list, except of a few words."""
    if not isinstance(value, list):
        return not isinstance(value, dict)
    return len(value) < 5 and all(isinstance(item, str) for item in value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows; columns with one value for all rows stand in a line above the table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    same = []
    if len(rows) > 2:
        for name in names:
            values = {json.dumps(row.get(name)) for row in rows}
            if len(values) == 1 and name:
                same.append(name)
    names = [name for name in names if name not in same]
    above = [f"- {words(name)}: {shown(rows[0].get(name))}" for name in same]
    cells = [[shown(row.get(name)) for name in names] for row in rows]
    lines = [[words(name) for name in names], *cells]
    if len(names) > WIDEST and len(rows) < WIDEST:
        lines = [list(line) for line in zip(*lines, strict=True)]
    header, *body = lines
    written = [_line(header), _line(["---"] * len(header)), *map(_line, body)]
    return "\n".join([*above, *([""] if above else []), *written])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def words(name: str) -> str:
    """Returns a key as words."""
    return name.replace("_", " ")


def shown(value: Any) -> str:
    """Formats a value for a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(value)
    text = f"{value:,}" if isinstance(value, int) else str(value)
    if COMMIT.match(text):
        return text[:10]
    if text.startswith("python "):
        return f"`{text}`"
    for character in "\\|<>*_":
        text = text.replace(character, f"\\{character}")
    return text
