"""From the log of a measured training run to its figures, and from figures to a judgement.

Keys of the results are those of the records in benchmarks/, older ones included.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from training_cases import CASES, TWINS

# Measured steps are divided into so many windows, each with its own rates. The steps of one more
# window before them are warm-up.
WINDOWS = 6
MEDIANS = (
    "samples_per_second",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "padding_share",
    "waiting_share",
)
SHOWN = (
    "samples_per_second",
    "tflop_per_second",
    "share_of_matmul",
    "mfu",
    "real_share",
    "waiting_share",
    "peak_memory_gib",
    "times_one_card",
    "start_s",
    "first_step_s",
)

Log = Sequence[Mapping[str, Any]]
Result = dict[str, Any]


def split_log(log: Log) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The line of a log at the end of the warm-up, and the lines at the end of each window."""
    window = log[-1]["step"] // (WINDOWS + 1)
    [warm_up] = [line for line in log if line["step"] == window]
    return warm_up, [line for line in log if line["step"] > window]


def figures(log: Log, machine: Mapping[str, Any]) -> Result:
    """Medians over the windows of a run.

    Args:
        machine: what `ceilings.py` measured.
    """
    warm_up, windows = split_log(log)
    rates = [line["samples_per_second"] for line in windows]
    padding = statistics.median(line["padding_share"] for line in windows)
    tflops = _median(windows, "tflop_per_second")
    losses = [line["loss"] for line in log]
    compilations = {
        "warm_up": int(warm_up["compilations"]),
        "later": int(windows[-1]["compilations"] - warm_up["compilations"]),
    }
    return {
        "steps": windows[-1]["step"] - warm_up["step"],
        **{name: _median(windows, name) for name in MEDIANS},
        "samples_per_second_of_windows": [float(f"{rate:.4g}") for rate in rates],
        "real_share": round(1 - padding, 4),
        "tflop_per_second": tflops,
        "mfu": _median(windows, "mfu"),
        "share_of_matmul": round(tflops / machine["matmul_tflops"], 3),
        "peak_memory_gib": windows[-1].get("memory_gib"),
        "compilations": compilations,
        "losses": losses,
        "losses_finite": None not in losses,  # a log has null for other values
    }


def _median(windows: Log, key: str) -> float | None:
    values = [line[key] for line in windows if line.get(key) is not None]
    return float(f"{statistics.median(values):.4g}") if values else None


def judge(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """Adds to results how they compare with their twin and with the targets of their case."""
    judged: dict[str, Result] = {}
    for name, result in results.items():
        judged[name] = dict(result)
        judged[name].pop("times_one_card", None)  # of an older record
        judged[name].pop("targets", None)
    for name, twin in TWINS.items():
        pair = [judged.get(case, {}).get("samples_per_second") for case in (name, twin)]
        if all(pair) and judged[name]["device"] == judged[twin]["device"]:
            judged[name]["times_one_card"] = round(pair[0] / pair[1], 2)
    for name, result in judged.items():
        if "samples_per_second" in result and result["device"] != "cpu":
            result["targets"] = {}
            for key, least in CASES[name].targets.items():
                value = result.get(key)
                met = value is not None and value >= least
                result["targets"][key] = {"at_least": least, "found": value, "met": met}
    return judged


def summary(result: Mapping[str, Any]) -> str:
    """A result in one line.

    >>> summary({"case": "bf16_8", "not_measured": "it needs a GPU"})
    'bf16_8             not measured: it needs a GPU'
    """
    beginning = f"{result['case']:<18} "
    if "failed" in result:
        return f"{beginning}failed: {result['failed']}"
    if "samples_per_second" not in result:
        return f"{beginning}not measured: {result['not_measured']}"
    shown = [f"{key} {result[key]}" for key in SHOWN if result.get(key) is not None]
    for key, target in result.get("targets", {}).items():
        shown.append(f"{key} {'met' if target['met'] else 'MISSED'}")
    return beginning + "  ".join(shown)
