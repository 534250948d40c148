"""Writes the model card of an exported folder.

The card describes the model, its training and training data, its scores, and how to load it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_lit.metrics.summary import VALIDATION, read_fit_summary
from qwenvl_lit.runs.model_types import model_name
from qwenvl_lit.runs.run import Run

# Settings that the card shows, by group.
SHOWN = {
    "data": (
        "train",
        "validation",
        "test",
        "root",
        "datasets",
        "order",
        "batch_size",
        "max_tokens",
        "packing",
    ),
    "optim": ("lr", "betas", "weight_decay", "warmup", "schedule"),
    "trainer": (
        "max_epochs",
        "max_steps",
        "rows_per_step",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "precision",
    ),
    "model": ("template", "system", "min_pixels", "max_pixels"),
}
EMPTY = (None, "", {}, [])


def model_card(
    name: str,
    *,
    run: Run | None,
    training: Mapping[str, Any],
    config: Mapping[str, Any],
    merged: bool,
    dtype: str,
    comparison: str,
) -> str:
    """Returns the card in Markdown.

    Args:
        name: the title of the card, which is the name of the folder.
        run: the run that was exported, or None for a published model.
        training: the config of the training run. It is empty if the model was not trained by this
            package.
        config: the exported settings of model and generation.
        merged: whether the folder contains a merged model, and not an adapter.
        dtype: the dtype of the weights of a merged model.
        comparison: the result of the comparison with the run.
    """
    model = model_name(config["model"])
    path = config["model"].get("path")
    in_folder = path is not None and Path(path).expanduser().is_dir()
    # A path is not valid on other machines, so the card shows only the name of the folder.
    base = Path(path).expanduser().resolve().name if in_folder else path
    if merged:
        library = "transformers"
        kind = f"{model} in the format of the published checkpoint, {dtype}."
    else:
        library, kind = "peft", f"A PEFT adapter for {model}, float32."
    lines = ["---"]
    if base:
        lines.append(f"base_model: {base}")
    lines += [f"library_name: {library}", "---", "", f"# {name}", "", kind, ""]
    lines += ["| | |", "|---|---|", f"| base | {base or 'random weights'} |"]
    lines += _training_rows(run, training)
    lines += _rows("model", config["model"], SHOWN["model"])
    lines += [f"| comparison | {comparison} |", ""]
    if run and run.folder:
        lines += _scores(run.folder)
    command = f"python -m qwenvl_lit.chat ckpt={name}"
    if in_folder and not merged:
        command += f" model.path=FOLDER-OF-{base}"
    lines += ["## Use", "", "```", command, "```", ""]
    lines += [f"The weights of {model} have their own license.", ""]
    return "\n".join(lines)


def _training_rows(run: Run | None, training: Mapping[str, Any]) -> Iterator[str]:
    if run and run.checkpoint:
        adapter = dict(run.config["adapter"])
        yield f"| checkpoint | {run.checkpoint.name} |"
        yield f"| trained | {adapter.pop('_target_').rpartition('.')[2]} |"
        yield from _rows("adapter", adapter, tuple(adapter))
    if start := training.get("init"):
        yield f"| started from | `{start['checkpoint']}` |"
    for group in ("data", "optim", "trainer"):
        yield from _rows(group, training.get(group) or {}, SHOWN[group])


def _rows(group: str, settings: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        value = settings.get(key)
        if value not in EMPTY:
            yield f"| {group}.{key} | {_code(value)} |"


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text}`".replace("|", "\\|")


def _scores(folder: Path) -> Iterator[str]:
    """Yields a table of the best and the last validation of a run, if there is any."""
    summary = read_fit_summary(folder)
    best, last = summary.best, summary.last
    if not summary.score_names:
        return
    yield from ("## Validation scores", "")
    yield f"| | best, step {best.get('step', '-')} | last, step {last.get('step', '-')} |"
    yield "|---|---|---|"
    for name in summary.score_names:
        title = name.removeprefix(VALIDATION)
        yield f"| {title} | {_score(best.get(name))} | {_score(last.get(name))} |"
    yield ""


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
