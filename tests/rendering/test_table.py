import pytest
import torch
from rich.console import Console

from qwenvl_lit.rendering.table import output_console, plain_table, score_table


def printed(*args, width: int = 120) -> list[list[str]]:
    """Returns the cells of the printed table, row by row."""
    return cells_of(score_table(*args, width=width), width)


def cells_of(table, width: int) -> list[list[str]]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
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


def test_a_table_that_is_too_wide_has_a_row_for_each_score():
    names = ("test", "a_rather_long_name_of_a_set")
    scores, before = {}, {}
    for name in names:
        scores |= {f"{name}/iou": 0.5, f"{name}/rows_iou": 400, f"{name}/rows": 1200}
        before |= {f"{name}/iou": 0.25, f"{name}/rows": 1200}
    assert len(printed(scores, before)) == 3
    assert printed(scores, before, width=60) == [
        ["set", "metric", "before", "score"],
        ["test", "iou", "0.250", "0.500 (400 rows)"],
        ["", "rows", "1200", "1200"],
        ["a_rather_long_name_", "iou", "0.250", "0.500 (400 rows)"],  # continued below itself
        ["of_a_set", "", "", ""],
        ["", "rows", "1200", "1200"],
    ]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_no_character_of_a_table_is_cut(width):
    row = {"set": "a_rather_long_name_of_a_set", "metric": "a_metric_with_a_rather_long_name"}
    row |= {f"number {index}": "0.123 to 0.456" for index in range(3)}
    by_column = zip(*cells_of(plain_table([row]), width), strict=True)
    texts = ["".join(cells).replace(" ", "") for cells in by_column]
    assert texts == [(name + value).replace(" ", "") for name, value in row.items()]


def test_a_file_has_wide_lines(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_console().width == 160  # pytest captures the output
    monkeypatch.setenv("COLUMNS", "60")
    assert output_console().width == 60
