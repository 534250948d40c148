"""Opens the test sets of the `test` command, generates answers, and scores the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric

from qwenvl_lit import build
from qwenvl_lit.atomic import write_text
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.predictions import FILENAME
from qwenvl_lit.evaluation.benchmarks import Benchmark
from qwenvl_lit.metrics.suggest import suggest_metrics
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.reports.scores import (
    ScoredSet,
    answered_rows,
    read_answer_texts,
    read_predictions,
    score_set,
)
from qwenvl_lit.reports.scores_page import EarlierRun
from qwenvl_lit.runs.predictions import predictions_file
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import DataError

BASELINE = "baseline.jsonl"  # answers of the model before training


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """Test sets that are evaluated together: all test sets of the command, or one benchmark."""

    config: DictConfig
    data: DataModule
    metrics: Mapping[str, Metric]
    benchmark: Benchmark | None = None

    @property
    def folder(self) -> Path:
        """The folder to which the answers are written."""
        return Path(self.config.paths.run)

    def name_of(self, set_name: str) -> str:
        """Returns the name of a test set that is unique among all evaluation sets."""
        if self.benchmark:
            return self.benchmark.name
        return set_name

    def predictions_in(self, run: str) -> Path:
        """Returns the file with an earlier run's answers to this evaluation set.

        Raises:
            DataError: the file does not exist.
        """
        if self.benchmark:
            return predictions_file(Path(run, self.benchmark.name))
        return predictions_file(run)

    def is_answered_in(self, run: str) -> bool:
        """Returns whether an earlier run has answered this benchmark."""
        assert self.benchmark
        return Path(run, self.benchmark.name, FILENAME).expanduser().exists()


def evaluation_sets(
    config: DictConfig, processor: Processor, benchmarks: Sequence[Benchmark]
) -> list[EvaluationSet]:
    """Opens an evaluation set for each of `benchmarks`. Without any, opens the command's data.

    Raises:
        DataError: no metrics are chosen, or a run in `compare=` has answered none of the test sets,
            or other rows.
    """
    sets = []
    for benchmark in benchmarks:
        sets.append(_evaluation_set(benchmark.config, processor, benchmark))
    if not sets:
        sets.append(_evaluation_set(config, processor))
    for evaluation_set in sets:
        if not evaluation_set.metrics:
            raise DataError(*_advice_on_metrics(evaluation_set.data))
    earlier = []
    for run in config.compare or ():
        for evaluation_set in _answered_sets(sets, run):
            earlier.append((evaluation_set.predictions_in(run), evaluation_set.data))
    if config.predictions:
        return sets  # nothing is answered
    if len(sets) > 1 or earlier:  # check everything before the first answer
        for evaluation_set in sets:
            _open(evaluation_set.data)
    for file, data in earlier:
        for _ in answered_rows(file, data.test):
            pass  # each answered row is looked up in the data
    return sets


def _evaluation_set(
    config: DictConfig, processor: Processor, benchmark: Benchmark | None = None
) -> EvaluationSet:
    return EvaluationSet(
        config=config,
        data=build.data(config, processor),
        metrics=build.metrics(config),
        benchmark=benchmark,
    )


def _answered_sets(sets: Sequence[EvaluationSet], run: str) -> list[EvaluationSet]:
    """Returns the evaluation sets that an earlier run has answered.

    Raises:
        DataError: there is none.
    """
    if len(sets) == 1:
        return list(sets)  # reading its answers raises the error
    answered = [evaluation_set for evaluation_set in sets if evaluation_set.is_answered_in(run)]
    if not answered:
        names = ", ".join(evaluation_set.name_of("") for evaluation_set in sets)
        raise DataError(f"compare={run}: there are no answers to {names} in this folder")
    return answered


def _open(data: DataModule) -> None:
    data.prepare_data()
    data.setup("test")


def _advice_on_metrics(data: DataModule) -> list[str]:
    """Returns the lines of an error message that suggests metrics."""
    _open(data)
    suggestions = []
    for name, rows in data.test.items():
        remark = f" ({name})" if len(data.test) > 1 else ""
        for metrics, why in suggest_metrics(rows):
            suggestions.append(f"  metrics={metrics}  {why}{remark}")
    advice = "These rows have no answers to compare with"
    if suggestions:
        advice = "These fit the answers:"
    first = f"metrics is missing: choose how to score. {advice}"
    several = "conf/metrics has all choices; several at once: metrics=[grounding,exact]"
    return [first, *suggestions, several]


def run_test(
    module: VisionLanguageModule, evaluation_set: EvaluationSet, *, baseline: bool = False
) -> dict[str, float]:
    """Generates answers with the model, and writes and scores the answers.

    Args:
        baseline: whether `module` is the model before training. Its answers are written to
            `BASELINE`, beside the answers of the trained model, and nothing else is written.

    Returns:
        The scores by SET/METRIC. Without `baseline`, also SET/seconds and SET/images_per_second.
        These two describe all test sets of `evaluation_set` together and are the same for each.
    """
    config = evaluation_set.config
    module.evaluate_with(generation=build.generation(config), metrics=evaluation_set.metrics)
    if evaluation_set.benchmark and rank_zero_only.rank == 0:
        print(f"\n{evaluation_set.benchmark.name}")
    callbacks = {"predictions": _baseline_writer()} if baseline else None
    trainer = build.trainer(config, callbacks=callbacks)
    trainer.test(module, evaluation_set.data, verbose=False)
    results = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if baseline:
        return results
    if evaluation_set.benchmark:
        _save_config(evaluation_set)
    for callback in trainer.callbacks:
        if isinstance(callback, Throughput):
            for set_name in evaluation_set.data.test_names:
                for rate, value in callback.rates.items():
                    results[f"{set_name}/{rate}"] = value
            break
    return results


def _baseline_writer() -> DictConfig:
    writer = "qwenvl_lit.callbacks.predictions.PredictionWriter"
    return OmegaConf.create({"_target_": writer, "filename": BASELINE})


@rank_zero_only
def _save_config(evaluation_set: EvaluationSet) -> None:
    """Writes the config that `predictions=` and `compare=` expect in the folder of a benchmark."""
    file = evaluation_set.folder / ".hydra" / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, OmegaConf.to_yaml(evaluation_set.config))


def open_answered_sets(data: DataModule, file: Path) -> list[str]:
    """Opens the sets of `data` to which the predictions in `file` belong.

    These are the sets that the `test` command opens or the sets that the `predict` command opens.

    Returns:
        The sets that the file answers and `data` does not have.

    Raises:
        DataError: `data` has none of the sets that the file answers.
    """
    data.prepare_data()
    answered = list(read_answer_texts(file))
    missing: dict[str, list[str]] = {}  # by stage
    known: dict[str, None] = {}
    for stage in ("test", "predict"):
        data.setup(stage)
        missing[stage] = [name for name in answered if name not in data.test_names]
        if not missing[stage]:
            return []
        known |= dict.fromkeys(data.test_names)
    stage = min(missing, key=lambda stage: len(missing[stage]))
    if len(missing[stage]) == len(answered):
        raise DataError(
            f"{file} answers the sets {', '.join(answered)}, the data has {', '.join(known)}; "
            "choose the data= with which the answers were generated"
        )
    data.setup(stage)
    return missing[stage]


def written_predictions_file(evaluation_set: EvaluationSet) -> Path | None:
    """Returns the file with the answers of the test, or None if none were written."""
    file = evaluation_set.folder / FILENAME
    if not file.exists():
        return None
    return file


def score_file(evaluation_set: EvaluationSet, file: Path, processor: Processor) -> list[ScoredSet]:
    """Scores the answers in `file` to the opened test sets of `evaluation_set`."""
    rows_by_set = evaluation_set.data.test
    scored = []
    for set_name, predictions in read_predictions(file, rows_by_set, processor).items():
        name, rows = evaluation_set.name_of(set_name), len(rows_by_set[set_name])
        scored.append(score_set(name, predictions, evaluation_set.metrics, rows=rows))
    return scored


def earlier_runs(
    config: DictConfig, sets: Sequence[EvaluationSet], processor: Processor
) -> Iterator[EarlierRun]:
    """Yields the runs to compare with, and their scores.

    With `baseline=true`, the first one is the model before training. The runs that `compare=` names
    follow.
    """
    if config.baseline:
        scored: dict[str, ScoredSet] = {}
        for evaluation_set in sets:
            file = evaluation_set.folder / BASELINE
            if file.exists():
                scored |= _by_name(score_file(evaluation_set, file, processor))
        if scored:
            yield EarlierRun(name="the model before training", sets=scored)
    for run in config.compare or ():
        scored = {}
        left_out: list[str] = []
        for evaluation_set in _answered_sets(sets, run):
            file = evaluation_set.predictions_in(run)
            scored |= _by_name(score_file(evaluation_set, file, processor))
            left_out += set(read_answer_texts(file)) - set(evaluation_set.data.test)
        yield EarlierRun(name=str(run), sets=scored, left_out=sorted(left_out))


def _by_name(sets: Sequence[ScoredSet]) -> dict[str, ScoredSet]:
    return {scored.name: scored for scored in sets}
