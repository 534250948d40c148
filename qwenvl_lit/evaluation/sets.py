"""What `test` does: test sets are answered, or the answers read from a file, then scored, compared and reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric

from qwenvl_lit import build
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.predictions import FILENAME
from qwenvl_lit.evaluation.benchmarks import Benchmark
from qwenvl_lit.metrics.suggest import suggested_metrics
from qwenvl_lit.models.protocols import Processor
from qwenvl_lit.reports.scores import ScoredSet, answers, read_predictions, score
from qwenvl_lit.reports.scores_page import EarlierRun
from qwenvl_lit.runs.predictions import predictions_file
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import DataError

BASELINE = "baseline.jsonl"  # what the model answered before training


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """Sets that are answered together: those of the command's data, or one benchmark."""

    config: DictConfig
    data: DataModule
    metrics: Mapping[str, Metric]
    benchmark: Benchmark | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.paths.run)

    @property
    def title(self) -> str:
        return self.benchmark.name if self.benchmark else ""

    def named(self, set: str) -> str:
        """What a set is called where all tests stand together."""
        return self.title or set


def tests(
    config: DictConfig, processor: Processor, benchmarks: Sequence[Benchmark]
) -> list[EvaluationSet]:
    """What the command asks for.

    Raises:
        DataError: nothing says how answers are to be scored.
    """
    found = [
        EvaluationSet(
            config=b.config,
            data=build.data(b.config, processor),
            metrics=build.metrics(b.config),
            benchmark=b,
        )
        for b in benchmarks
    ]
    if not found:
        found = [
            EvaluationSet(
                config=config, data=build.data(config, processor), metrics=build.metrics(config)
            )
        ]
    for test in found:
        if not test.metrics:
            _refuse(test.data)
    for test in (
        found if len(found) > 1 else ()
    ):  # what the last one lacks is told before the first is answered
        test.data.prepare_data()
        test.data.setup("test")
    for place in config.compare or ():
        _files_of(place, found)
    return found


def _files_of(place: str, all_tests: Sequence[EvaluationSet]) -> list[tuple[EvaluationSet, Path]]:
    """Where an earlier run has its answers to each test.

    Raises:
        DataError: it has none.
    """
    return [
        (test, predictions_file(Path(place, test.title) if test.title else place))
        for test in all_tests
    ]


def _refuse(data: DataModule) -> None:
    data.prepare_data()
    data.setup("test")
    said = [
        f"\n  metrics={metrics}  {why}" + (f" ({name})" if len(data.test) > 1 else "")
        for name, rows in data.test.items()
        for metrics, why in suggested_metrics(rows)
    ]
    fitting = (
        f"What would fit these answers:{''.join(said)}"
        if said
        else "These rows have no answers to compare with"
    )
    raise DataError(
        f"metrics is missing: say how the answers are to be scored. {fitting}\nAll choices are in conf/metrics"
    )


def answer(
    task: VisionLanguageModule, test: EvaluationSet, *, baseline: bool = False
) -> dict[str, float]:
    """Let the model answer; its scores as they are logged, and for each set `seconds` and `images_per_second` of all of them.

    Args:
        baseline: it is the model before training, which leaves its answers beside those of the trained one, and nothing else.
    """
    task.evaluate_with(generation=build.generation(test.config), metrics=test.metrics)
    writer = {"_target_": "qwenvl_lit.callbacks.predictions.PredictionWriter", "filename": BASELINE}
    trainer = build.trainer(
        test.config, callbacks={"predictions": OmegaConf.create(writer)} if baseline else None
    )
    trainer.test(task, test.data, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if baseline:
        return scores
    if test.benchmark:
        _save_config(test)
    rates = next(
        (callback.rates for callback in trainer.callbacks if isinstance(callback, Throughput)), {}
    )
    return scores | {
        f"{name}/{rate}": value for name in test.data.test_names for rate, value in rates.items()
    }


@rank_zero_only
def _save_config(test: EvaluationSet) -> None:
    """So that a benchmark's folder is one that `predictions=` and `compare=` take."""
    file = test.folder / ".hydra" / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(test.config, file)


def open_answered(data: DataModule, file: Path) -> None:
    """Open the sets that the predictions in `file` answer: those that `test` takes, or those that `predict` does.

    Raises:
        DataError: the data has no such sets.
    """
    data.prepare_data()
    wanted = list(read_predictions(file))
    known: list[str] = []
    for stage in ("test", "predict"):
        data.setup(stage)
        if set(wanted) <= set(data.test_names):
            return
        known += data.test_names
    raise DataError(
        f"{file} answers the sets {', '.join(wanted)}, the data has {', '.join(dict.fromkeys(known))}; give the data= it was made with"
    )


def scored(test: EvaluationSet, file: Path, processor: Processor) -> list[ScoredSet]:
    """The answers in a file, scored; sets that are not open are left out."""
    found = answers(file, test.data.test, processor)
    return [
        score(test.named(name), some, test.metrics, rows=len(test.data.test[name]))
        for name, some in found.items()
    ]


def earlier(
    config: DictConfig, all_tests: Sequence[EvaluationSet], processor: Processor
) -> Iterator[EarlierRun]:
    """The runs to compare with: the model before training, if it was asked for, and those that `compare=` names."""
    if (
        before := [test for test in all_tests if (test.folder / BASELINE).exists()]
    ) and config.baseline:
        sets = [one for test in before for one in scored(test, test.folder / BASELINE, processor)]
        yield EarlierRun(name="the model before training", sets={one.name: one for one in sets})
    for place in config.compare or ():
        sets = [
            one
            for test, file in _files_of(place, all_tests)
            for one in scored(test, file, processor)
        ]
        yield EarlierRun(name=str(place), sets={one.name: one for one in sets})


def answered_file(test: EvaluationSet) -> Path | None:
    """What the test has written; None if the command line took the writer away."""
    file = test.folder / FILENAME
    return file if file.exists() else None
