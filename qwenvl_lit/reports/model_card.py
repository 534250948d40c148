"""The model card of an exported folder: what it is, what it was trained on and how, how well it does, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_lit.runs.run import Run

DATA = (
    "train",
    "validation",
    "test",
    "root",
    "datasets",
    "order",
    "batch_size",
    "max_tokens",
    "packing",
)
OPTIM = ("lr", "betas", "weight_decay", "warmup", "schedule")
TRAINER = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")


def model_card(
    name: str,
    *,
    run: Run | None,
    trained: Mapping[str, Any],
    config: Mapping[str, Any],
    merged: bool,
    dtype: str,
    compared: str,
) -> str:
    """Markdown.

    Args:
        run: that it comes from; None: a model as it was published.
        trained: the config of the training; empty where others trained it.
        config: of the model and how it answers, as plain data.
        compared: what the comparison with the run has found.
    """
    path = config["model"].get("path")
    here = path is not None and Path(path).expanduser().is_dir()
    base = (
        Path(path).expanduser().resolve().name if here else path
    )  # where a folder lies says nothing elsewhere
    kind = (
        "Qwen-VL in the published layout"
        if merged
        else "An adapter for Qwen-VL in the format of peft"
    )
    lines = [
        "---",
        *([f"base_model: {base}"] if base else []),
        f"library_name: {'transformers' if merged else 'peft'}",
        "---",
        "",
    ]
    lines += [
        f"# {name}",
        "",
        f"{kind}, {dtype if merged else 'float32'}.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {base or 'random weights'} |",
    ]
    if run and run.checkpoint:
        adapter = run.config["adapter"]
        lines += [
            f"| checkpoint | {run.checkpoint.name} |",
            f"| trained | {adapter['_target_'].rpartition('.')[2]} |",
        ]
        lines += _rows(
            "adapter", {key: value for key, value in adapter.items() if key != "_target_"}
        )
    if earlier := trained.get("init"):
        lines.append(f"| started from | `{earlier['checkpoint']}` |")
    for group, keys in (("data", DATA), ("optim", OPTIM), ("trainer", TRAINER)):
        lines += _rows(group, {key: (trained.get(group) or {}).get(key) for key in keys})
    lines += [
        *_rows("model", {key: config["model"].get(key) for key in ("template", "system")}),
        f"| compared | {compared} |",
        "",
    ]
    if run and run.folder:
        lines += _scores(run.folder)
    elsewhere = f" model.path=FOLDER-OF-{base}" if here and not merged else ""
    lines += ["## Use", "", "```", f"python -m qwenvl_lit.chat ckpt={name}{elsewhere}", "```", ""]
    return "\n".join([*lines, "The weights of Qwen-VL have their own licence.", ""])


def _rows(group: str, node: Mapping[str, Any]) -> list[str]:
    return [
        f"| {group}.{key} | {_text(value)} |"
        for key, value in node.items()
        if value not in (None, "", {}, [])
    ]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text}`".replace("|", "\\|")


def _scores(folder: Path) -> list[str]:
    """A table of the best validation of a run and of its last one, if it had any."""
    file = folder / "metrics.json"
    fit = json.loads(file.read_text(encoding="utf-8")).get("fit", {}) if file.exists() else {}
    best, last = (fit.get(which) or {} for which in ("best", "last"))
    names = [name for name in {**best, **last} if name.startswith("val/")]
    if not names:
        return []
    lines = [
        "## Scores of the validation",
        "",
        f"| | best, step {best.get('step', '-')} | last, step {last.get('step', '-')} |",
        "|---|---|---|",
    ]
    return [
        *lines,
        *(
            f"| {name[4:]} | {_score(best.get(name))} | {_score(last.get(name))} |"
            for name in names
        ),
        "",
    ]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
