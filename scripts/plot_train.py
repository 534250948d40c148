"""Plots `benchmarks/train.json`: measured speed beside the original code and the machine's limits.

python scripts/plot_train.py benchmarks/train.json train.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from training_cases import BASELINES, CASES, TFLOP_PER_SAMPLE

GREY, BLUE, SAND = "#999999", "#1f77b4", "#e0c9a6"
SPEED_LABEL = "samples / s, for rows of one length"
SHARE_LABEL = "FLOP / s per GPU, relative to its fastest bfloat16 matmul"
Bars = list[tuple[str, float, str]]  # label, value, color


def draw(record: Mapping[str, Any], file: Path) -> None:
    """Plots samples per second for even rows, and the share of the fastest matmul for all cases."""
    measured = [result for result in record["results"] if result.get("samples_per_second")]
    panels = []
    for bars, label in (
        (_speeds(measured, record["ceilings"]), SPEED_LABEL),
        (_shares(measured), SHARE_LABEL),
    ):
        if bars:
            panels.append((bars, label))
    heights = [len(bars) for bars, _ in panels]
    figure = Figure(figsize=(9, 2.5 + 0.28 * sum(heights)), layout="constrained")
    figure.suptitle(f"Training: {record['model']}")
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axes, (bars, label) in zip(grid.flat, panels, strict=True):
        _draw_bars(axes, bars, label)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _speeds(measured: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> Bars:
    bars: Bars = []
    if any(result["device"] != "cpu" for result in measured):
        bars += [(name, value, GREY) for name, value in BASELINES.items()]
    labels = _labels(measured)
    for result in measured:
        if CASES[result["case"]].rows == "even":
            bars.append((labels[result["case"]], result["samples_per_second"], BLUE))
    bars += [(name, value, SAND) for name, value in limits(ceilings).items()]
    return bars


def _shares(measured: Sequence[Mapping[str, Any]]) -> Bars:
    bars: Bars = []
    labels = _labels(measured)
    for result in measured:
        if result.get("share_of_matmul"):
            bars.append((labels[result["case"]], result["share_of_matmul"], BLUE))
    return bars


def _labels(measured: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A label for each case; it names the device if the record has several."""
    several = len({result["device"] for result in measured}) > 1
    labels = {}
    for result in measured:
        label = result["what"]
        if several:
            label += f" ({result['device'].removeprefix('NVIDIA ').split()[0]})"
        labels[result["case"]] = label
    return labels


def limits(ceilings: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Samples per second if a GPU did nothing but matmuls, at their measured speed."""
    speeds = {}
    for device, ceiling in ceilings.items():
        for dtype, key in (("bf16", "matmul_tflops"), ("FP8", "fp8_matmul_tflops")):
            if device != "cpu" and ceiling[key]:
                for what, tflop in TFLOP_PER_SAMPLE.items():
                    speeds[f"limit of {device}: {dtype}, {what}"] = ceiling[key] / tflop
    return speeds


def _draw_bars(axes, bars: Bars, label: str) -> None:
    names, values, colors = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=colors, tick_label=names)
    axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("file", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    draw(json.loads(arguments.record.read_text()), arguments.file)


if __name__ == "__main__":
    main()
