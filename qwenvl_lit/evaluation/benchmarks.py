"""Published test sets by name: what `test` asks, scores and compares with when it is given `benchmarks=[refcoco/val,flickr30k/test]`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from qwenvl_lit.types import DataError

SHARED = (
    "data.root",
    "data.path_map",
    "data.download",
    "data.prompt",
    "data.eval_batch_size",
    "data.num_workers",
    "data.on_bad_",
)
SHARED += (
    "data.max_bad_fraction",
    "generation.",
    "metrics=",
    "metrics.",
)  # of the command line: what it says of these holds for each


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One set with its protocol."""

    name: str  # "refcoco/val"
    config: DictConfig  # the command's own, with data, metrics, generation and folder of this set
    metric: str  # what was published
    published: Mapping[str, float] = field(default_factory=dict)  # by model, times 100
    mean: Mapping[str, float] = field(
        default_factory=dict
    )  # as `published`, of the mean over all sets of the file
    published_of: str | None = None  # the split that was published, where it is another
    seen_with: Mapping[str, str] = field(
        default_factory=dict
    )  # files to learn from that show these images, and why they do

    @property
    def set(self) -> str:
        return self.name.partition("/")[2]

    def warnings(self, learned_from: Sequence[str]) -> Iterator[str]:
        """What a reader of the score has to know of a model that learned from these files."""
        for file in learned_from:
            for pattern, why in self.seen_with.items():
                if fnmatch.fnmatchcase(Path(file.partition("#")[0]).name, pattern):
                    yield f"{self.name}: the model learned from {file}: {why}. The score is too good to be compared"


def named_benchmarks(config: DictConfig) -> list[Benchmark]:
    """What `config.benchmarks` names, FILE of conf/benchmark with all its sets, or FILE/SET; `#N` behind it takes N rows.

    Raises:
        DataError: there is no such file or set.
    """
    return [benchmark for name in config.benchmarks for benchmark in _benchmarks(str(name), config)]


def _benchmarks(asked: str, config: DictConfig) -> Iterator[Benchmark]:
    name, _, count = asked.partition("#")
    file, _, wanted = name.partition("/")
    given = [
        argument
        for argument in HydraConfig.get().overrides.task
        if argument.lstrip("+~").startswith(SHARED)
    ]
    try:
        node = hydra.compose(f"benchmark/{file}", overrides=given)
    except MissingConfigException:
        known = GlobalHydra.instance().config_loader().get_group_options("benchmark")
        raise DataError(f"benchmarks: there is no {file}; known are {', '.join(known)}") from None
    sets = node.data.test
    if wanted and wanted not in sets:
        raise DataError(f"benchmarks: {file} has no set {wanted}; it has {', '.join(sets)}")
    published = OmegaConf.to_container(node.published)
    for one in [wanted] if wanted else list(sets):
        whole = deepcopy(config)
        OmegaConf.set_struct(whole, False)
        whole.data, whole.metrics, whole.generation = (
            deepcopy(node[group]) for group in ("data", "metrics", "generation")
        )
        whole.data.test = {one: f"{sets[one]}#{count}" if count else sets[one]}
        whole.data.train = whole.data.validation = None
        whole.paths.run = str(Path(config.paths.run, file, one))
        yield Benchmark(
            name=f"{file}/{one}",
            config=whole,
            metric=node.metric,
            published=published.get(one, {}),
            mean=published.get("mean", {}),
            published_of=node.get("published_of"),
            seen_with=OmegaConf.to_container(node.seen_with) if "seen_with" in node else {},
        )


def files_learned_from(data: Mapping[str, Any]) -> list[str]:
    """The files that a run's `data` has to learn from, those of every dataset of a mixture."""
    sources = [
        data,
        *(
            source
            for source in (data.get("datasets") or {}).values()
            if isinstance(source, Mapping)
        ),
    ]
    found = [source.get("train") or () for source in sources]
    return [file for files in found for file in ([files] if isinstance(files, str) else files)]


def compared(
    benchmarks: Sequence[Benchmark], results: Mapping[str, float], model: str
) -> list[dict[str, str]]:
    """Rows of one table: score and published score of each benchmark, times 100, and how long it took.

    Args:
        results: scores as BENCHMARK/METRIC, and BENCHMARK/rows, /seconds and /images_per_second.
        model: whose published scores.
    """
    rows = []
    for benchmark in benchmarks:
        score = results.get(f"{benchmark.name}/{benchmark.metric}")
        of = f" ({benchmark.published_of})" if benchmark.published_of else ""
        rows.append(
            {
                "benchmark": benchmark.name,
                "metric": benchmark.metric,
                **_against(score, benchmark.published.get(model), model, of),
                "rows": f"{results[f'{benchmark.name}/rows']:,.0f}",
                "seconds": _figure(results.get(f"{benchmark.name}/seconds")),
                "images/s": _figure(results.get(f"{benchmark.name}/images_per_second")),
            }
        )
        file = benchmark.name.partition("/")[0]
        same = [other for other in benchmarks if other.name.partition("/")[0] == file]
        if benchmark.mean and len(same) > 1 and benchmark is same[-1]:
            scores = [results.get(f"{other.name}/{benchmark.metric}") for other in same]
            mean = sum(scores) / len(scores) if None not in scores else None
            empty = {"rows": "", "seconds": "", "images/s": ""}
            rows.append(
                {
                    "benchmark": f"{file}, mean",
                    "metric": benchmark.metric,
                    **_against(mean, benchmark.mean.get(model), model, ""),
                    **empty,
                }
            )
    return rows


def published_model(config: DictConfig) -> str:
    """Whose published scores a model is compared with, told by the name of its base."""
    return (
        "Qwen-VL-Chat" if "chat" in Path(config.model.get("path") or "").name.lower() else "Qwen-VL"
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _against(score: float | None, published: float | None, model: str, of: str) -> dict[str, str]:
    return {
        "score": "" if score is None else f"{100 * score:.2f}",
        f"{model}, published": "" if published is None else f"{published:.2f}{of}",
        "difference": ""
        if score is None or published is None
        else f"{100 * score - published:+.2f}",
    }
