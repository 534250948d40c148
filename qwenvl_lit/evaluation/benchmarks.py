"""Benchmarks: published test sets, chosen by name as in `test benchmarks=[refcoco/val]`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.metrics.per_sample import ROWS
from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.runs.model_types import QWEN_VL, READ, model_name
from qwenvl_lit.types import DataError

# Overrides that begin with one of these prefixes apply to every benchmark.
SHARED_OVERRIDES = (
    "data.root",
    "data.path_map",
    "data.download",
    "data.allow_private_hosts",
    "data.user_agent",
    "data.exif",
    "data.on_deep_image",
    "data.prompt",
    "data.read.parquet",
    "data.boxes",
    "data.eval_batch_size",
    "data.num_workers",
    "data.on_bad_",
    "data.max_bad_fraction",
    "generation.",
    "metrics=",
    "metrics.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """A sum of the scores of test sets, such as MME's perception."""

    name: str
    sets: Sequence[str]  # names of test sets of the same file
    published: Mapping[str, float] = field(default_factory=dict)  # by model, times 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A published test set, its evaluation settings, and published scores by model, times 100."""

    name: str  # FILE/SET, such as "refcoco/val": a file of conf/benchmark and a test set in it
    # The config of the command, in which data, metrics, generation and run folder are replaced by
    # those of this test set.
    config: DictConfig
    metric: str  # the metric of the published scores
    published: Mapping[str, float] = field(default_factory=dict)
    published_mean: Mapping[str, float] = field(default_factory=dict)  # over all sets of FILE
    sums: Sequence[Sum] = ()  # over sets of FILE
    published_split: str | None = None  # the split of the published scores if it is another one
    published_template: str = "raw"  # the template of the prompts of the published scores
    # Pattern of the names of training files that contain images of this test set -> explanation.
    seen_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def published_models(self) -> set[str]:
        """The models that have a published score of this test set, or of several of its file."""
        models = {*self.published, *self.published_mean}
        for each in self.sums:
            models |= set(each.published)
        return models

    @property
    def file(self) -> str:
        """The name of the file in conf/benchmark."""
        return self.name.partition("/")[0]

    def warnings(self, training_files: Sequence[str]) -> Iterator[str]:
        """Yields a warning for each training file that contains images of this test set."""
        for file in training_files:
            file_name = Path(file.partition("#")[0]).name
            for pattern, relation in self.seen_with.items():
                if fnmatch.fnmatchcase(file_name, pattern):
                    yield (
                        f"{self.name}: the model was trained on {file}; {relation}. "
                        "The score is too high to compare it with published scores"
                    )


def read_benchmarks(config: DictConfig) -> list[Benchmark]:
    """Reads the benchmarks that `config.benchmarks` lists.

    An entry is FILE/SET, or FILE for all test sets of a file of conf/benchmark. With `#N` at the
    end, only N rows of each test set are used.

    Raises:
        DataError: the file or the test set does not exist.
    """
    benchmarks: list[Benchmark] = []
    for name in config.benchmarks:
        benchmarks += _read(str(name), config)
    return benchmarks


def _read(name: str, config: DictConfig) -> Iterator[Benchmark]:
    path, _, count = name.partition("#")
    file, _, chosen_set = path.partition("/")
    node = _compose(file)
    sets = node.data.test
    if chosen_set and chosen_set not in sets:
        raise DataError(f"benchmarks: {file} has no set {chosen_set}; it has {', '.join(sets)}")
    published = OmegaConf.to_container(node.published)
    seen_with = {}
    if "seen_with" in node:
        seen_with = OmegaConf.to_container(node.seen_with)
    sums = []
    for sum_name, summed in node.get("sums", {}).items():
        sums.append(Sum(name=sum_name, sets=list(summed), published=published.get(sum_name, {})))
    for set_name, rows in sets.items():
        if chosen_set and set_name != chosen_set:
            continue
        if count:
            rows = f"{rows}#{count}"
        yield Benchmark(
            name=f"{file}/{set_name}",
            config=_config_of_set(config, node, file, set_name, rows),
            metric=node.metric,
            published=published.get(set_name, {}),
            published_mean=published.get("mean", {}),
            sums=sums,
            published_split=node.get("published_of"),
            published_template=node.get("published_template", "raw"),
            seen_with=seen_with,
        )


def _compose(file: str) -> DictConfig:
    """Composes conf/benchmark/FILE with the command line's overrides in `SHARED_OVERRIDES`."""
    shared = []
    for override in HydraConfig.get().overrides.task:
        if override.lstrip("+~").startswith(SHARED_OVERRIDES):
            shared.append(override)
    try:
        return hydra.compose(f"benchmark/{file}", overrides=shared)
    except MissingConfigException:
        known = sorted(path.stem for path in (config_folder() / "benchmark").glob("*.yaml"))
        raise DataError(f"benchmarks: there is no {file}; known are {', '.join(known)}") from None


def _config_of_set(
    config: DictConfig, node: DictConfig, file: str, set_name: str, rows: str
) -> DictConfig:
    """Returns the config of the command for a single test set, which is read from `rows`."""
    config = deepcopy(config)
    OmegaConf.set_struct(config, False)
    for group in ("data", "metrics", "generation"):
        config[group] = deepcopy(node[group])
    config.data.test = {set_name: rows}
    config.data.train = config.data.validation = None
    config.paths.run = str(Path(config.paths.run, file, set_name))
    return config


def training_files(data: Mapping[str, Any]) -> list[str]:
    """Returns all training files in the `data` config of a run, including mixed datasets."""
    sources = [data]
    for source in (data.get("datasets") or {}).values():
        if isinstance(source, Mapping):
            sources.append(source)
    files: list[str] = []
    for source in sources:
        train = source.get("train") or ()
        files += [train] if isinstance(train, str) else train
    return files


def benchmark_table(
    benchmarks: Sequence[Benchmark], results: Mapping[str, float], model: str | None
) -> list[dict[str, str]]:
    """Returns a table row for each benchmark with its score and the published score, times 100.

    If the mean over all test sets of a file is published, a row with the mean follows the last
    test set of the file. Rows with the sums of a file follow likewise if all of its test sets are
    in the table.

    Args:
        results: scores by BENCHMARK/METRIC, and the numbers BENCHMARK/rows_METRIC, BENCHMARK/rows,
            BENCHMARK/seconds and BENCHMARK/images_per_second.
        model: the name of the model whose published scores are shown; None: none are shown. Without
            a published score of this model, the columns for it are left out.
    """
    if not any(model in benchmark.published_models for benchmark in benchmarks):
        model = None
    table = []
    for benchmark in benchmarks:
        score = results.get(f"{benchmark.name}/{benchmark.metric}")
        published = benchmark.published.get(model) if model else None
        rows = results.get(f"{benchmark.name}/{ROWS}_{benchmark.metric}")
        if rows is None:
            rows = results[f"{benchmark.name}/{ROWS}"]
        table.append(
            {
                "benchmark": benchmark.name,
                "metric": benchmark.metric,
                **_comparison(score, published, model, benchmark.published_split),
                "rows": f"{rows:,.0f}",
                "seconds": _figure(results.get(f"{benchmark.name}/seconds")),
                "images/s": _figure(results.get(f"{benchmark.name}/images_per_second")),
            }
        )
        same_file = [other for other in benchmarks if other.file == benchmark.file]
        is_last = benchmark is same_file[-1]
        if benchmark.published_mean and len(same_file) > 1 and is_last:
            total = _total([other.name for other in same_file], benchmark.metric, results)
            mean = None if total is None else total / len(same_file)
            published = benchmark.published_mean.get(model) if model else None
            table.append(_summary_row(benchmark, "mean", mean, published, model))
        for each in benchmark.sums if is_last else ():
            names = [f"{benchmark.file}/{set_name}" for set_name in each.sets]
            if {other.name for other in same_file}.issuperset(names):
                total = _total(names, benchmark.metric, results)
                published = each.published.get(model) if model else None
                table.append(_summary_row(benchmark, each.name, total, published, model))
    return table


def _total(names: Sequence[str], metric: str, results: Mapping[str, float]) -> float | None:
    """Returns the sum of the scores of benchmarks, or None if a score is missing."""
    scores = [results.get(f"{name}/{metric}") for name in names]
    return None if None in scores else sum(scores)


def _summary_row(
    benchmark: Benchmark,
    title: str,
    score: float | None,
    published: float | None,
    model: str | None,
) -> dict[str, str]:
    """Returns the row of a score over several test sets of the file of `benchmark`."""
    return {
        "benchmark": f"{benchmark.file}, {title}",
        "metric": benchmark.metric,
        **_comparison(score, published, model),
        "rows": "",
        "seconds": "",
        "images/s": "",
    }


def _comparison(
    score: float | None, published: float | None, model: str | None, split: str | None = None
) -> dict[str, str]:
    cells = {"score": "" if score is None else f"{100 * score:.2f}"}
    if model is None:
        return cells
    cells |= {f"{model}, published": "", "difference": ""}
    if published is not None:
        remark = f" ({split})" if split else ""
        cells[f"{model}, published"] = f"{published:.2f}{remark}"
    if score is not None and published is not None:
        cells["difference"] = f"{100 * score - published:+.2f}"
    return cells


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def published_model_name(config: DictConfig) -> str | None:
    """Returns the name of the model whose published scores are comparable; None: there is none.

    conf/benchmark has the scores of Qwen-VL, Qwen-VL-Chat and SeeClick. The name of the base model
    decides which of them a model is compared with.
    """
    if model_name(config.model) != READ[QWEN_VL]:
        return None
    name = Path(config.model.get("path") or "").name.lower()
    if "seeclick" in name:
        return "SeeClick"
    return "Qwen-VL-Chat" if "chat" in name else "Qwen-VL"
