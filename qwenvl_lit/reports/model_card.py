"""Writes the model card of an exported folder.

The card describes the model, its training and training data, its scores, and how to load it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from qwenvl_lit.metrics.summary import VALIDATION, read_fit_summary
from qwenvl_lit.runs.model_types import is_hub_name, model_name, published_name
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
APACHE = {"license": "apache-2.0"}
# Licenses of published weights, as metadata of the Hub: pattern of the name -> license
LICENSES = {
    r"Qwen/Qwen-VL(-Chat)?": {
        "license": "other",
        "license_name": "tongyi-qianwen-license-agreement",
        "license_link": "https://github.com/QwenLM/Qwen-VL/blob/master/LICENSE",
    },
    r"Qwen/Qwen2\.5-VL-3B-Instruct": {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
    },
    r"Qwen/Qwen2\.5-VL-72B-Instruct": {
        "license": "other",
        "license_name": "qwen",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-72B-Instruct/blob/main/LICENSE",
    },
    r"Qwen/Qwen2\.5-VL-(7|32)B-Instruct": APACHE,
    r"Qwen/Qwen3-VL-\d+B-(Instruct|Thinking)": APACHE,
}
HUB_DATASET = re.compile(r"hf://([\w.-]+/[\w.-]+)")


def model_card(
    name: str,
    *,
    run: Run | None,
    training: Mapping[str, Any],
    config: Mapping[str, Any],
    merged: bool,
    dtype: str,
    comparison: str,
    repository: str | None = None,
) -> str:
    """Returns the card in Markdown, with metadata for the Hugging Face Hub.

    Args:
        name: the title of the card, which is the name of the folder.
        run: the run that was exported, or None for a published model.
        training: the config of the training run. It is empty if the model was not trained by this
            package.
        config: the exported settings of model and generation.
        merged: whether the folder contains a merged model, and not an adapter.
        dtype: the dtype of the weights of a merged model.
        comparison: the result of the comparison with the run.
        repository: `owner/name` on the Hub, if the folder is to be uploaded.
    """
    model = model_name(config["model"])
    path = config["model"].get("path")
    in_folder = path is not None and Path(path).expanduser().is_dir()
    # A path is not valid on other machines, so the card shows only the name of the folder.
    base = Path(path).expanduser().resolve().name if in_folder else path
    if merged:
        kind = f"{model} in the format of the published checkpoint, {dtype}."
    else:
        kind = f"A PEFT adapter for {model}, float32."
    metadata = ModelCardData(
        library_name="transformers" if merged else "peft",
        pipeline_tag="image-text-to-text",
        tags=["qwenvl_lit", *_adapter_tag(run)],
        datasets=_hub_datasets(training),
        **_origin(path),
    )
    lines = ["---", metadata.to_yaml(), "---", "", f"# {name}", "", kind, ""]
    lines += ["| | |", "|---|---|", f"| base | {base or 'random weights'} |"]
    lines += _training_rows(run, training)
    lines += _rows("model", config["model"], SHOWN["model"])
    lines += [f"| comparison | {comparison} |", ""]
    if run and run.folder:
        lines += _scores(run.folder)
    command = f"python -m qwenvl_lit.chat ckpt={name}"
    if in_folder and not merged:
        command += f" model.path=FOLDER-OF-{base}"
    commands = [command]
    if repository:
        commands.insert(0, f"hf download {repository} --local-dir {name}")
    lines += ["## Use", "", "```", *commands, "```", ""]
    lines += [f"The weights of {model} have their own license.", ""]
    return "\n".join(lines)


def _origin(path: str | None) -> dict[str, Any]:
    """Returns the metadata that follow from the base model: its name on the Hub and its license.

    A base model in a folder has a name on the Hub only if the folder is named like a published
    model. The license of other models is not known.
    """
    if path is None:
        return {}
    published = published_name(path)
    origin: dict[str, Any] = {}
    if base := path if is_hub_name(path) else published:
        origin["base_model"] = base
    for pattern, terms in LICENSES.items():
        if published and re.fullmatch(pattern, published):
            origin |= terms
    return origin


def _adapter_tag(run: Run | None) -> list[str]:
    if run is None or not run.checkpoint:
        return []
    method = run.config["adapter"]["_target_"].rpartition(".")[2]
    return [] if method == "Full" else [method.lower()]


def _hub_datasets(training: Mapping[str, Any]) -> list[str] | None:
    """Returns the names of the datasets on the Hub among the training data; None without any."""
    found = HUB_DATASET.findall(json.dumps(training.get("data") or {}, default=str))
    return list(dict.fromkeys(found)) or None


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
