"""Plots of what a run has logged, one image per scalar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwenvl_lit.callbacks.run_log import LOG, read_log

NOT_PLOTTED = {"step", "total", "epoch", "elapsed_s", "remaining_s"}
AXIS_LABELS = {  # of other scalars, their name
    "loss": "loss (nats per token)",
    "accuracy": "next-token accuracy",
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "learning rate",
    "samples_per_second": "samples / s",
    "tokens_per_second": "tokens / s, without padding",
    "supervised_tokens_per_second": "supervised tokens / s",
    "padding_share": "share of padding",
    "waiting_share": "share of time waiting for data",
    "tflop_per_second": "TFLOP / s per device",
    "mfu": "model FLOPs utilization",
    "compilations": "compiled graphs",
    "memory_gib": "peak memory (GiB)",
}
SMOOTHED = {"loss", "accuracy", "grad_norm"}
SMOOTHING = 0.9  # as in ms-swift and TensorBoard
TRAINING_COLOUR, VALIDATION_COLOUR = "#1f77b4", "#d95f02"

Points = tuple[list[int], list[float]]  # steps and values


class Curves(lightning.Callback):
    """Plots the log of the run when training ends, also after an error or an interrupt.

    It reads what `RunLog` has written.
    """

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
            run = Path(trainer.default_root_dir)
            draw_curves(read_log(run / LOG), run / "curves")


def draw_curves(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes `NAME.png` for each scalar of the records, and returns the files.

    Validation (`val/NAME`) is drawn as points in the image of NAME. Noisy scalars are drawn twice,
    raw in a light colour and smoothed. Missing values and null are left out.
    """
    names: dict[str, None] = {}  # in order of appearance
    for record in records:
        for name in record:
            if name not in NOT_PLOTTED:
                names[name.removeprefix("val/")] = None
    files = []
    for name in names:
        training, validation = _points(records, name), _points(records, f"val/{name}")
        if training[0] or validation[0]:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{name.replace('/', '_')}.png"
            _plot(name, training, validation).savefig(file, dpi=120)
            files.append(file)
    return files


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Returns the exponential moving average without a bias towards the first value.

    >>> smooth([1.0, 1.0, 4.0], 0.5)
    [1.0, 1.0, 2.7142857142857144]
    """
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def _points(records: Sequence[Mapping[str, Any]], name: str) -> Points:
    steps, values = [], []
    for record in records:
        if record.get(name) is not None:
            steps.append(record["step"])
            values.append(record[name])
    return steps, values


def _plot(name: str, training: Points, validation: Points) -> Figure:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, values = training
    if steps and name in SMOOTHED:
        smoothed = smooth(values, SMOOTHING)
        label = f"training, smoothed ({SMOOTHING})"
        axes.plot(steps, values, color=TRAINING_COLOUR, alpha=0.3, linewidth=1, label="training")
        axes.plot(steps, smoothed, color=TRAINING_COLOUR, linewidth=2, label=label)
    elif steps:
        axes.plot(steps, values, color=TRAINING_COLOUR, linewidth=1.5, label="training")
    if validation[0]:
        style = {"color": VALIDATION_COLOUR, "marker": "o", "markersize": 5, "linewidth": 1}
        axes.plot(*validation, **style, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(AXIS_LABELS.get(name, name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    if len(axes.lines) > 1 or validation[0]:
        axes.legend(frameon=False)
    return figure
