"""Opens the sets of rows of one or several datasets, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.data.selection import Concat, Rows, Subset, flatten


def all_sets(
    datasets: Mapping[str, DatasetSpec],
) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Opens the rows of all sets: those of training and validation, then the test sets.

    Training rows occur once each, and empty sets are left out. Nothing is written: if the run has
    not drawn its held-out rows yet, they are drawn as training would draw them.
    """
    training: dict[str, Rows] = {}
    for name, dataset in datasets.items():
        if dataset.split_file is not None and not Path(dataset.split_file).expanduser().exists():
            dataset = replace(dataset, split_file=None)
        opened = dataset.open_for_inspection()
        sources, positions = flatten(Concat(opened.stages))
        training[_set_name(name, "train")] = Subset(Concat(sources), np.unique(positions))
        training[_set_name(name, "validation")] = opened.validation
    tests: dict[str, Rows] = {}
    for name, rows in test_sets(datasets).items():
        if name in training:
            name = f"{name} (test)"
        tests[name] = rows
    return _without_empty(training), _without_empty(tests)


def test_sets(datasets: Mapping[str, DatasetSpec]) -> dict[str, Rows]:
    """Opens the test sets of all datasets."""
    sets: dict[str, Rows] = {}
    for name, dataset in datasets.items():
        opened = dataset.open_tests()
        for test_name, rows in opened.items():
            if name and len(opened) == 1:
                sets[name] = rows
            else:
                sets[_set_name(name, test_name)] = rows
    return sets


def validation_sets(datasets: Mapping[str, DatasetSpec]) -> dict[str, Rows]:
    """Opens the validation rows of all datasets; empty sets are left out."""
    opened: dict[str, Rows] = {}
    for name, dataset in datasets.items():
        opened[name or "validation"] = dataset.open_validation()
    return _without_empty(opened)


def _set_name(dataset: str, name: str) -> str:
    return f"{dataset}_{name}" if dataset else name


def _without_empty(sets: Mapping[str, Rows]) -> dict[str, Rows]:
    return {name: rows for name, rows in sets.items() if len(rows)}
