"""Curves of a run, one image a scalar, from its `logging.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwenvl_lit.callbacks.run_log import LOG, read_log

NO_CURVE = {"step", "total", "epoch", "elapsed_s", "remaining_s"}
AXES = {  # what the axis says; other scalars go by their name
    "loss": "loss (nats per token)",
    "accuracy": "next-token accuracy",
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "learning rate",
    "samples_per_second": "samples / s",
    "tokens_per_second": "tokens / s, padding not counted",
    "supervised_tokens_per_second": "supervised tokens / s",
    "padding_share": "share of padding",
    "waiting_share": "share of the time that data is waited for",
    "tflop_per_second": "operations of a device (1e12 / s)",
    "mfu": "share of the device's peak rate",
    "compilations": "graphs that were compiled",
    "memory_gib": "peak memory (GiB)",
}
SMOOTHED = {"loss", "accuracy", "grad_norm"}
SMOOTHING = 0.9  # as the curves of ms-swift and TensorBoard

Points = tuple[list[int], list[float]]


class Curves(lightning.Callback):
    """Draws the curves of the run folder when training ends, also by an error or an interrupt. It needs `RunLog`."""

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._draw(trainer)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self._draw(trainer)

    def _draw(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            draw_curves(
                read_log(Path(trainer.default_root_dir, LOG)),
                Path(trainer.default_root_dir, "curves"),
            )


def draw_curves(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write `NAME.png` for each scalar of the records, training and validation (`val/NAME`) in one image; returns the files.

    Noisy scalars are shown twice, raw in a light colour and smoothed; validation as points. Missing and null values are left out.
    """
    names = dict.fromkeys(
        name.removeprefix("val/") for record in records for name in record if name not in NO_CURVE
    )
    files = []
    for name in names:
        training, validation = _points(records, name), _points(records, f"val/{name}")
        if training[0] or validation[0]:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{name.replace('/', '_')}.png")
            _draw_curve(name, training, validation).savefig(files[-1], dpi=120)
    return files


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without a bias towards the first value.

    >>> smooth([1.0, 1.0, 4.0], 0.5)
    [1.0, 1.0, 2.7142857142857144]
    """
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def _points(records: Sequence[Mapping[str, Any]], name: str) -> Points:
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _draw_curve(name: str, training: Points, validation: Points) -> Figure:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, values = training
    if steps and name in SMOOTHED:
        axes.plot(steps, values, color="#1f77b4", alpha=0.3, linewidth=1, label="training")
        axes.plot(
            steps,
            smooth(values, SMOOTHING),
            color="#1f77b4",
            linewidth=2,
            label=f"training, smoothed ({SMOOTHING})",
        )
    elif steps:
        axes.plot(steps, values, color="#1f77b4", linewidth=1.5, label="training")
    if validation[0]:
        axes.plot(
            *validation, color="#d95f02", marker="o", markersize=5, linewidth=1, label="validation"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(AXES.get(name, name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    if len(axes.lines) > 1 or validation[0]:
        axes.legend(frameon=False)
    return figure
