"""`python -m qwenvl_lit.test ckpt=RUN`: answer test sets and score the answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command
from qwenvl_lit.cli.overrides import has_any
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

SOURCES = ("ckpt=", "model=", "predictions=")  # arguments that say whose answers are scored


def main(config: DictConfig) -> None:
    from pathlib import Path

    from lightning.pytorch.utilities import rank_zero_only
    from rich.console import Console

    from qwenvl_lit import build
    from qwenvl_lit.callbacks.run_log import save_scores
    from qwenvl_lit.evaluation.benchmarks import (
        benchmark_table,
        named_benchmarks,
        published_model,
        training_files,
    )
    from qwenvl_lit.evaluation.sets import (
        earlier_runs,
        evaluation_sets,
        open_answered_sets,
        run_test,
        score_file,
        written_predictions,
    )
    from qwenvl_lit.rendering.table import plain_table, score_table
    from qwenvl_lit.reports.scores_page import ScoreReport, write_report
    from qwenvl_lit.runs.predictions import predictions_file
    from qwenvl_lit.runs.run import find_run

    if config.predictions and (config.benchmarks or config.baseline or config.ckpt):
        raise DataError(
            "predictions= scores answers that are there: leave out ckpt, benchmarks and baseline, or predictions"
        )
    build.start(config)
    benchmarks = named_benchmarks(config) if config.benchmarks else []
    processor = build.processor(config)
    asked = evaluation_sets(config, processor, benchmarks)
    run = find_run(config.ckpt) if config.ckpt else None
    baseline: dict[str, float] = {}
    results: dict[str, float] = {}
    sets = []
    if config.predictions:
        source = config.predictions
        [test] = asked
        file = predictions_file(config.predictions)
        open_answered_sets(test.data, file)
        sets = score_file(test, file, processor)
        for one in sets:
            results |= {f"{one.name}/{metric}": value for metric, value in one.totals.items()} | {
                f"{one.name}/rows": len(one.predictions)
            }
    else:
        checkpoint = run.checkpoint if run else None
        source = build.shown(str(checkpoint)) if checkpoint else config.model.path
        if config.baseline:
            untrained = build.module(config, adapted=run is not None)
            for test in asked:
                scores = run_test(untrained, test, baseline=True)
                baseline |= {_name(test, name): value for name, value in scores.items()}
            untrained.unload_model()
        module = build.module(config, adapted=run is not None, trained_checkpoint=checkpoint)
        for test in asked:
            scores = run_test(module, test)
            results |= {_name(test, name): value for name, value in scores.items()}
    if rank_zero_only.rank:
        return
    scores = {
        name: value
        for name, value in results.items()
        if not name.endswith(("/seconds", "/images_per_second"))
    }
    save_scores(config.paths.run, "test", scores)
    if baseline:
        save_scores(config.paths.run, "baseline", baseline)
    if not config.predictions:
        sets = [
            one
            for test in asked
            if (file := written_predictions(test))
            for one in score_file(test, file, processor)
        ]
    rows = benchmark_table(benchmarks, results, published_model(config))
    notes = [
        note
        for one in benchmarks
        for note in one.warnings(training_files(run.config["data"]) if run else [])
    ]
    if benchmarks and config.model.get("template", "raw") != "raw":
        notes.append(
            "Questions were asked in chat markup; published scores, Qwen-VL-Chat's too, are without: model.template=raw"
        )
    report = ScoreReport(
        title=f"Scores of {source}",
        sets=sets,
        published=rows,
        notes=notes,
        earlier=list(earlier_runs(config, asked, processor)),
    )
    page = Path(config.paths.run, "report.html")
    write_report(report, page)

    print(
        f"\nScores of {source}"
        + ("" if benchmarks else f" on the sets {', '.join(one.name for one in sets)}")
    )
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has room for whole names
    console.print(plain_table(rows) if benchmarks else score_table(scores, baseline or None))
    for note in notes:
        print(note)
    beside = ["metrics.json", *([] if config.predictions else ["predictions"])]
    beside += ["images with boxes"] if Path(config.paths.run, "boxes").exists() else []
    print(f"Report: {build.shown(str(page))}   beside it: {', '.join(beside)}")


def _name(test, logged: str) -> str:
    """`refcoco/val/acc_at_50` for `val/acc_at_50` of a benchmark."""
    set_name, _, metric = logged.rpartition("/")
    return f"{test.name_of(set_name)}/{metric}"


def adjust_arguments(arguments: list[str]) -> list[str]:
    """Completes what the arguments imply.

    Without a model, `compare=[A,B]` scores the answers of B and compares them with those of A.
    Benchmarks share the keys of `data=jsonl`, which the command line may change.

    Raises:
        DataError: `compare=` names one folder and nothing to compare it with.

    >>> adjust_arguments(["compare=['a','b']"])
    ["compare=['a']", "predictions='b'"]
    """
    adjusted = []
    for argument in arguments:
        if argument.startswith("compare=[") and not has_any(arguments, *SOURCES):
            folders = re.findall(r"'(?:[^'\\]|\\.)*'", argument)
            if len(folders) < 2:
                raise DataError(
                    "compare=[RUN1,RUN2] takes two runs at least; beside ckpt= or predictions= "
                    "it takes those to compare with"
                )
            adjusted.append(f"compare=[{','.join(folders[:-1])}]")
            adjusted.append(f"predictions={folders[-1]}")
        else:
            adjusted.append(argument)
    if has_any(arguments, "benchmarks=") and not has_any(arguments, "data="):
        adjusted.append("data=jsonl")
    return adjusted


if __name__ == "__main__":
    command("test", main, run="needed", adjust=adjust_arguments)
