import torch
from rich.console import Console

from qwenvl_lit.rendering.table import score_table


def printed(*args) -> list[list[str]]:
    """Returns the cells of the printed table, row by row."""
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(score_table(*args))
    rows = []
    for line in capture.get().replace("┃", "│").splitlines():
        if "│" in line:
            rows.append([cell.strip() for cell in line.strip("│").split("│")])
    return rows


def test_metrics_are_rows_and_sets_are_columns():
    scores = {
        "test/caption": torch.tensor(0.5),
        "test/rows": 200.0,
        "unseen/caption": 0.25,
        "unseen/rows": 31.0,
        "unseen/iou": 1 / 3,
    }
    assert printed(scores) == [
        ["metric", "test", "unseen"],
        ["caption", "0.500", "0.250"],
        ["iou", "", "0.333"],
        ["rows", "200", "31"],
    ]


def test_a_metric_that_has_not_scored_all_rows_names_how_many():
    scores = {"a/exact": 0.5, "a/rows_exact": 30.0, "a/iou": 0.25, "a/rows_iou": 17.0, "a/rows": 30}
    assert printed(scores) == [
        ["metric", "a"],
        ["exact", "0.500"],
        ["iou", "0.250 (17 rows)"],
        ["rows", "30"],
    ]


def test_a_baseline_has_a_column_beside_each_set():
    assert printed({"test/caption": 0.9, "test/new": 0.1}, {"test/caption": 0.1}) == [
        ["metric", "test, before", "test"],
        ["caption", "0.100", "0.900"],
        ["new", "", "0.100"],
    ]


def test_a_set_may_have_a_slash_in_its_name():
    assert printed({"refcoco/testA/acc": 0.9})[0] == ["metric", "refcoco/testA"]


def test_without_scores_there_are_no_rows():
    assert printed({}) == [["metric"]]
