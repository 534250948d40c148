"""Draws `benchmarks/train.json`: what was measured beside what the original does and what the machine could do.

python scripts/plot_train.py benchmarks/train.json train.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from training_cases import BASELINES, CASES, TFLOP_OF_A_SAMPLE

GREY, BLUE, SAND = "#999999", "#1f77b4", "#e0c9a6"
RATE = "samples / s, of rows of one length"
SHARE = "operations / s of a device, as a share of its matrix product (not of FP8)"
Bars = list[tuple[str, float, str]]  # label, value, colour


def draw(record: Mapping[str, Any], file: Path) -> None:
    """Samples a second of rows of one length, and the share of the measured matrix product of all cases that have one."""
    measured = [one for one in record["results"] if one.get("samples_per_second")]
    on_gpu = any(one["device"] != "cpu" for one in measured)
    rates: Bars = [(name, value, GREY) for name, value in BASELINES.items() if on_gpu]
    devices = {one["device"]: one["device"].removeprefix("NVIDIA ").split()[0] for one in measured}
    named = {
        one["case"]: one["what"] + (f" ({devices[one['device']]})" if len(devices) > 1 else "")
        for one in measured
    }
    rates += [
        (named[one["case"]], one["samples_per_second"], BLUE)
        for one in measured
        if CASES[one["case"]].rows == "even"
    ]
    rates += [(name, value, SAND) for name, value in limits(record["ceilings"]).items()]
    shares: Bars = [
        (named[one["case"]], one["share_of_matmul"], BLUE)
        for one in measured
        if one.get("share_of_matmul")
    ]
    panels = [(bars, label) for bars, label in ((rates, RATE), (shares, SHARE)) if bars]
    figure = Figure(figsize=(9, 2.5 + 0.28 * (len(rates) + len(shares))), layout="constrained")
    figure.suptitle(f"Training: {record['model']}")
    heights = [len(bars) for bars, _ in panels]
    for axes, (bars, label) in zip(
        figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False).flat,
        panels,
        strict=True,
    ):
        _bars(axes, bars, label)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def limits(ceilings: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Samples a second if a card did nothing but matrix products, at the rate that was measured of one."""
    made = {}
    for device, found in ceilings.items():
        for kind, key in (("bf16", "matmul_tflops"), ("FP8", "fp8_matmul_tflops")):
            if device != "cpu" and found[key]:
                made |= {
                    f"limit of {device}: {kind}, {what}": found[key] / work
                    for what, work in TFLOP_OF_A_SAMPLE.items()
                }
    return made


def _bars(axes, bars: Bars, label: str) -> None:
    names, values, colours = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=colours, tick_label=names)
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
