"""Plots the logged values of a run, one image per value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
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
SMOOTHING = 0.6  # weight of earlier values, TensorBoard's default
AVERAGED = 0.02  # share of the values that a smoothed one averages, in long runs: its lag
FEW = 30  # so many values at most are marked, since a single one has no line, and not smoothed
LABEL_CHARACTERS = 40  # of a line of the label of the y axis
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

    Validation values, `val/NAME`, are points in the image of NAME. Noisy values are drawn twice,
    if there are more than `FEW`: unsmoothed in a light color, and smoothed. Missing values and null
    are left out.
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


def smoothing_weight(count: int) -> float:
    """Returns the weight with which `count` values are smoothed.

    An average of weight w spans about 1 / (1 - w) values and lags as many behind: 2.5, or in long
    runs a fiftieth of the values, so that it never lags far in the image.

    >>> smoothing_weight(72), smoothing_weight(1000)
    (0.6, 0.95)
    """
    return max(SMOOTHING, 1 - 1 / max(1, AVERAGED * count))


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Returns the exponential moving average with bias correction, as TensorBoard computes it.

    NaN and infinity stay where they are and do not change the average of the others.

    >>> smooth([1.0, 1.0, 4.0], 0.5)
    [1.0, 1.0, 2.7142857142857144]
    """
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        if not math.isfinite(value):
            smoothed.append(value)
            continue
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
    if len(steps) > FEW and name in SMOOTHED:
        weight = smoothing_weight(len(values))
        smoothed = smooth(values, weight)
        label = f"training, smoothed ({weight:.2g})"
        axes.plot(steps, values, color=TRAINING_COLOR, alpha=0.3, linewidth=1, label="training")
        axes.plot(steps, smoothed, color=TRAINING_COLOR, linewidth=2, label=label)
    elif steps:
        [line] = axes.plot(steps, values, color=TRAINING_COLOR, linewidth=1.5, label="training")
        if len(steps) <= FEW:
            line.set(marker="o", markersize=4)
    if validation[0]:
        style = {"color": VALIDATION_COLOR, "marker": "o", "markersize": 5}
        axes.plot(*validation, **style, linewidth=1, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(fill(AXIS_LABELS.get(name, name), LABEL_CHARACTERS))
    shown = steps + validation[0]
    if min(shown) == max(shown):
        axes.set_xlim(min(shown) - 1, max(shown) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    if len(axes.lines) > 1 or validation[0]:
        axes.legend(frameon=False)
    return figure
