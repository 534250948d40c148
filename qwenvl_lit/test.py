"""`python -m qwenvl_lit.test`: answers test sets and scores the answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command
from qwenvl_lit.cli.overrides import has_any
from qwenvl_lit.libraries import import_libraries
from qwenvl_lit.terminal import printable, wrapped
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qwenvl_lit.evaluation.benchmarks import Benchmark
    from qwenvl_lit.evaluation.sets import EvaluationSet
    from qwenvl_lit.models.protocols import Processor
    from qwenvl_lit.reports.scores import ScoredSet
    from qwenvl_lit.runs.run import Run

SOURCES = ("ckpt=", "model=", "predictions=")  # arguments that say whose answers are scored
RATES = ("/seconds", "/images_per_second")  # measurements among the results
log = logging.getLogger("qwenvl_lit.test")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a test found: results as SET/NAME, and the answers behind them."""

    source: str
    results: dict[str, float]
    baseline: dict[str, float]
    sets: list[ScoredSet]

    @property
    def scores(self) -> dict[str, float]:
        return {name: value for name, value in self.results.items() if not name.endswith(RATES)}


def main(config: DictConfig) -> None:
    if config.predictions and (config.benchmarks or config.baseline or config.ckpt):
        raise DataError(
            "predictions= scores stored answers: leave out ckpt, benchmarks and baseline, "
            "or predictions"
        )
    import_libraries()
    from pathlib import Path

    from lightning.pytorch.utilities import rank_zero_only

    from qwenvl_lit import build
    from qwenvl_lit.evaluation.benchmarks import read_benchmarks
    from qwenvl_lit.evaluation.sets import evaluation_sets
    from qwenvl_lit.evaluation.trained_rows import find_trained_rows
    from qwenvl_lit.metrics.summary import SCORES_FILE
    from qwenvl_lit.runs.run import find_run

    build.start(config)
    if rank_zero_only.rank == 0:  # scores of an earlier start, which did not end
        Path(config.paths.run, SCORES_FILE).unlink(missing_ok=True)
    benchmarks = read_benchmarks(config) if config.benchmarks else []
    processor = build.processor(config)
    sets = evaluation_sets(config, processor, benchmarks)
    run = None
    if config.ckpt:
        run = find_run(config.ckpt, trust=config.trust, verify=config.verify)
    trained_rows = find_trained_rows(sets, run) if run and rank_zero_only.rank == 0 else []
    for warning in trained_rows:
        log.warning(warning)
    if config.predictions:
        outcome = score_stored_answers(config, sets, processor)
    else:
        outcome = answer_and_score(config, sets, processor, run)
    if rank_zero_only.rank == 0:
        notes = [*trained_rows, *_notes(config, benchmarks, run)]
        report(config, sets, processor, benchmarks, notes, outcome)


def score_stored_answers(
    config: DictConfig, sets: Sequence[EvaluationSet], processor: Processor
) -> Outcome:
    """Scores the answers of `predictions=`; no weights are loaded."""
    from qwenvl_lit.evaluation.sets import open_answered_sets, score_file
    from qwenvl_lit.metrics.per_sample import ROWS
    from qwenvl_lit.runs.predictions import predictions_file

    [evaluation_set] = sets
    file = predictions_file(config.predictions)
    left_out = open_answered_sets(evaluation_set.data, file)
    if left_out:
        log.warning("answers to sets that the data lacks are not scored: %s", ", ".join(left_out))
    scored_sets = score_file(evaluation_set, file, processor)
    results: dict[str, float] = {}
    for scored in scored_sets:
        for metric, value in scored.totals.items():
            results[f"{scored.name}/{metric}"] = value
            results[f"{scored.name}/{ROWS}_{metric}"] = scored.mean(metric).rows
        results[f"{scored.name}/{ROWS}"] = len(scored.predictions)
    return Outcome(source=config.predictions, results=results, baseline={}, sets=scored_sets)


def answer_and_score(
    config: DictConfig, sets: Sequence[EvaluationSet], processor: Processor, run: Run | None
) -> Outcome:
    """Lets the model answer, with `baseline=true` first the model before training."""
    from qwenvl_lit import build
    from qwenvl_lit.evaluation.sets import run_test, score_file, written_predictions_file

    baseline: dict[str, float] = {}
    if config.baseline:
        untrained = build.module(config, adapted=run is not None)
        for evaluation_set in sets:
            scores = run_test(untrained, evaluation_set, baseline=True)
            baseline |= _named(evaluation_set, scores)
        untrained.unload_model()
    checkpoint = run.checkpoint if run else None
    module = build.module(config, adapted=run is not None, trained_checkpoint=checkpoint)
    results: dict[str, float] = {}
    for evaluation_set in sets:
        results |= _named(evaluation_set, run_test(module, evaluation_set))
    scored_sets: list[ScoredSet] = []
    for evaluation_set in sets:
        file = written_predictions_file(evaluation_set)
        if file is not None:
            scored_sets += score_file(evaluation_set, file, processor)
    source = build.shown(str(checkpoint)) if checkpoint else config.model.path
    if source is None:
        source = "a model with random weights"
    return Outcome(source=source, results=results, baseline=baseline, sets=scored_sets)


def _named(evaluation_set: EvaluationSet, scores: dict[str, float]) -> dict[str, float]:
    """`refcoco/val/acc_at_50` for `val/acc_at_50` of a benchmark."""
    named = {}
    for logged, value in scores.items():
        set_name, _, metric = logged.rpartition("/")
        named[f"{evaluation_set.name_of(set_name)}/{metric}"] = value
    return named


def report(
    config: DictConfig,
    sets: Sequence[EvaluationSet],
    processor: Processor,
    benchmarks: Sequence[Benchmark],
    notes: Sequence[str],
    outcome: Outcome,
) -> None:
    """Writes `metrics.json` and `report.html`, and prints the scores.

    Args:
        notes: what a reader of the scores must know.
    """
    from pathlib import Path

    from qwenvl_lit import build
    from qwenvl_lit.callbacks.run_log import save_scores
    from qwenvl_lit.cli.resume import REPORT
    from qwenvl_lit.evaluation.benchmarks import benchmark_table, published_model_name
    from qwenvl_lit.evaluation.sets import earlier_runs
    from qwenvl_lit.rendering.table import output_console, plain_table, score_table
    from qwenvl_lit.reports.scores_page import ScoreReport, comparison_rows, write_report

    folder = Path(config.paths.run)
    save_scores(folder, "test", outcome.scores)
    if outcome.baseline:
        save_scores(folder, "baseline", outcome.baseline)
    published = benchmark_table(benchmarks, outcome.results, published_model_name(config))
    title = f"Scores of {outcome.source}"
    page = folder / REPORT
    earlier = list(earlier_runs(config, sets, processor))
    write_report(
        ScoreReport(
            title=title,
            sets=outcome.sets,
            published=published,
            notes=notes,
            earlier=earlier,
            processor=processor,
        ),
        page,
    )
    console = output_console()
    if benchmarks:
        print(f"\n{printable(title)}")
        console.print(plain_table(published))
    else:
        names = ", ".join(scored.name for scored in outcome.sets)
        print("\n" + printable(f"{title} on the sets {names}"))
        console.print(score_table(outcome.scores, outcome.baseline or None, width=console.width))
    for run in earlier:
        print("\n" + printable(f"Against {run.name}"))
        if rows := comparison_rows(run, outcome.sets):
            console.print(plain_table(rows))
        else:
            print("The two runs have no rows in common that can be compared.")
        for sentence in run.not_compared(outcome.sets):
            print(printable(sentence))
    for note in notes:
        print(printable(note))
    files = ["metrics.json"]
    if not config.predictions:
        files.append("predictions")
    if (folder / "boxes").exists():
        files.append("images with boxes")
    print(wrapped(f"Report: {build.shown(str(page))}   beside it: {', '.join(files)}"))


def _notes(config: DictConfig, benchmarks: Sequence[Benchmark], run: Run | None) -> list[str]:
    """Warnings about the comparison with published scores."""
    from qwenvl_lit.evaluation.benchmarks import published_model_name, training_files

    files = training_files(run.config["data"]) if run else []
    notes: list[str] = []
    for benchmark in benchmarks:
        notes += benchmark.warnings(files)
    compared = [benchmark for benchmark in benchmarks if benchmark.published_models]
    if not compared:
        return notes
    model = published_model_name(config)
    if model is None:
        notes.append("The published scores are of Qwen-VL, so they are not shown for this model.")
        return notes
    others: dict[str, None] = {}
    for each in compared:
        if model not in each.published_models:
            models = " and ".join(sorted(each.published_models))
            others[f"{each.file}: the published scores are of {models}, not of {model}."] = None
    notes += others
    compared = [benchmark for benchmark in compared if model in benchmark.published_models]
    template = config.model.get("template", "raw")
    other = "raw" if template == "chatml" else "chatml"
    files = dict.fromkeys(each.file for each in compared if each.published_template == other)
    if files and other == "raw":
        notes.append(
            f"{', '.join(files)}: questions were asked with chat markup. The published scores, "
            f"Qwen-VL-Chat's too, are without: model.template=raw"
        )
    elif files:
        notes.append(
            f"{', '.join(files)}: questions were asked without chat markup. The published scores "
            f"are with it: model.template=chatml"
        )
    return notes


def adjust_arguments(arguments: list[str]) -> list[str]:
    """Completes what the arguments imply.

    `compare=A` is `compare=[A]`. Without a model, `compare=[A,B]` scores the answers of B and
    compares them with those of A. Benchmarks share the keys of `data=jsonl`, which the command line
    may change; it lacks `data.read.parquet`.

    Raises:
        DataError: `compare=` names one folder and nothing to compare it with.

    >>> adjust_arguments(["compare=['a','b']"])
    ["compare=['a']", "predictions='b'"]
    """
    adjusted = []
    for argument in arguments:
        if argument.startswith("compare='"):  # a single folder
            argument = f"compare=[{argument.removeprefix('compare=')}]"
        if argument.startswith("compare=[") and not has_any(arguments, *SOURCES):
            folders = re.findall(r"'(?:[^'\\]|\\.)*'", argument)
            if len(folders) < 2:
                raise DataError(
                    "compare=[RUN1,RUN2] takes two runs at least; beside ckpt= or predictions= "
                    "it takes those to compare with"
                )
            adjusted.append(f"compare=[{','.join(folders[:-1])}]")
            adjusted.append(f"predictions={folders[-1]}")
        elif argument.startswith("data.read.parquet=") and has_any(arguments, "benchmarks="):
            adjusted.append(f"++{argument}")
        else:
            adjusted.append(argument)
    if has_any(arguments, "benchmarks=") and not has_any(arguments, "data="):
        adjusted.append("data=jsonl")
    return adjusted


if __name__ == "__main__":
    command("test", main, run="needed", adjust=adjust_arguments)
