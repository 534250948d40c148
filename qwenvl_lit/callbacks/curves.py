"""Plots the logged values of a run, one image per value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.callbacks.run_log import LOG, read_log

NOT_PLOTTED = {"step", "total", "epoch", "elapsed_s", "remaining_s"}
AXIS_LABELS = {  # the label of any other value is its name
    "loss": "loss (nats per token)",
    "accuracy": "next-token accuracy",
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "learning rate",
    "samples_per_second": "samples / s",
    "tokens_per_second": "tokens / s, without padding",
    "supervised_tokens_per_second": "supervised tokens / s",
    "padding_share": "fraction of padding",
    "waiting_share": "fraction of time waiting for data",
    "tflop_per_second": "TFLOP / s per device",
    "mfu": "model FLOPs utilization",
    "compilations": "compiled graphs",
    "memory_gib": "peak memory (GiB)",
}
SMOOTHED = {"loss", "accuracy", "grad_norm"}
SMOOTHING = 0.9  # weight of earlier values, computed as in ms-swift and TensorBoard
AVERAGED = 10  # values: the smoothed curve begins where it averages so many, 1 / (1 - SMOOTHING)
TRAINING_COLOR, VALIDATION_COLOR = "#1f77b4", "#d95f02"

Points = tuple[list[int], list[float]]  # steps and values


class Curves(lightning.Callback):
    """Plots the logged values when training ends, also after an error or an interrupt.

    The values are read from the file that `RunLog` writes.
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
    """Writes a file `NAME.png` for each value NAME in the records, and returns the files.

    Validation values, `val/NAME`, are points in the image of NAME. Noisy values are drawn twice:
    unsmoothed in a light color, and smoothed from the tenth value on, since the average of fewer
    is about the first value. Missing values and null are left out.
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
            with atomic_file(file) as unfinished:
                _plot(name, training, validation).savefig(unfinished, format="png", dpi=120)
            files.append(file)
    return files


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Returns the exponential moving average with bias correction.

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
        start = AVERAGED - 1
        smoothed = smooth(values, SMOOTHING)[start:]
        label = f"training, smoothed ({SMOOTHING})"
        axes.plot(steps, values, color=TRAINING_COLOR, alpha=0.3, linewidth=1, label="training")
        if smoothed:
            axes.plot(steps[start:], smoothed, color=TRAINING_COLOR, linewidth=2, label=label)
    elif steps:
        axes.plot(steps, values, color=TRAINING_COLOR, linewidth=1.5, label="training")
    if validation[0]:
        style = {"color": VALIDATION_COLOR, "marker": "o", "markersize": 5, "linewidth": 1}
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
