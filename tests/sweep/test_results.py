import csv
import json
import re
from io import StringIO
from pathlib import Path

import pytest

from qwenvl_lit.sweep.report import report, result_table
from qwenvl_lit.sweep.results import Result, read_results, save_result, varied_keys
from qwenvl_lit.types import DataError


def write_job(folder, number, *overrides, error=None, **scores):
    """A job that has ended; `scores` are of its best checkpoint, without their `val/`."""
    job = folder / str(number)
    save_result(job, ["adapter=lora", *overrides], seconds=61.04, error=error)
    if scores:
        best = {"step": 4, "monitor": "val/loss"}
        best |= {f"val/{name}": value for name, value in scores.items()}
        fit = {"last": {"val/loss": 9.0}, "best": best}
        (job / "metrics.json").write_text(json.dumps({"fit": fit}))


@pytest.fixture
def sweep_folder(tmp_path):
    """Eleven jobs of ranks 1 to 11: job 3 failed, job 4 has a NaN loss. Job 11 has not ended."""
    for number in range(11):
        override = f"adapter.rank={number + 1}"
        if number == 3:
            write_job(tmp_path, number, override, error="CUDA out of memory")
        else:
            loss = None if number == 4 else 2 - number / 10
            write_job(tmp_path, number, override, loss=loss, caption=number / 20)
    (tmp_path / "11").mkdir()
    return tmp_path


def names(results) -> list[str]:
    return [result.folder.name for result in results]


def test_ended_jobs_are_read_in_the_order_of_their_numbers(sweep_folder):
    assert names(read_results(sweep_folder)) == [str(number) for number in range(11)]


def test_the_table_has_the_best_job_first_and_jobs_without_a_score_last(sweep_folder):
    report(sweep_folder, metric="val/loss", mode="min")
    rows = list(csv.DictReader((sweep_folder / "sweep.csv").open()))
    assert list(rows[0]) == ["job", "adapter.rank", "val/loss", "val/caption", "seconds", "error"]
    assert [row["job"] for row in rows] == ["10", "9", "8", "7", "6", "5", "2", "1", "0", "3", "4"]
    best, failed = rows[0], rows[-2]
    assert (best["adapter.rank"], best["val/loss"]) == ("11", "1.0")
    assert (best["val/caption"], best["error"]) == ("0.5", "")
    assert (failed["val/loss"], failed["error"]) == ("", "CUDA out of memory")


def test_the_mode_decides_which_end_is_best(sweep_folder):
    assert names(report(sweep_folder, metric="val/caption", mode="max"))[:2] == ["10", "9"]
    assert names(report(sweep_folder, metric="val/caption", mode="min"))[:2] == ["0", "1"]


def test_an_unknown_metric_is_refused_with_the_names_of_the_known_ones(sweep_folder):
    with pytest.raises(DataError, match=r"sweep\.metric=val/cider: .* val/caption, val/loss"):
        report(sweep_folder, metric="val/cider", mode="min")


def test_the_terminal_shows_varied_values_scores_and_errors(sweep_folder):
    from rich.console import Console

    console = Console(width=100, record=True, file=StringIO())
    ranked = report(sweep_folder, metric="val/loss", mode="min")
    console.print(result_table(ranked, "val/loss"))
    lines = [re.sub(r"\s*[│┃]\s*", "|", line) for line in console.export_text().splitlines()]
    assert lines[1] == "|job|adapter.rank|val/loss|time|error|"
    assert lines[3] == "|10|11|1|1:01||"
    assert lines[12] == "|3|4||1:01|CUDA out of memory|"


def test_values_that_all_jobs_share_are_not_varied():
    assert varied_keys([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}]) == ["b"]
    assert varied_keys([{"a": "1"}]) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"overrides": 3, "seconds": 1, "error": null, "config": null}',
        '{"overrides": [], "seconds": 1, "error": null, "config": 5}',
    ],
)
def test_a_damaged_result_counts_as_none(sweep_folder, caplog, content):
    (sweep_folder / "2/job.json").write_text(content)
    assert "2" not in names(read_results(sweep_folder))
    [warning] = caplog.records
    assert "2/job.json cannot be read" in warning.getMessage()
    assert "The job counts as unfinished" in warning.getMessage()


def test_values_with_brackets_are_shown_as_they_are():
    from rich.console import Console

    files = "data.train=[/data/a.jsonl,/data/b.jsonl]"
    results = []
    for index, value in enumerate((files, "data.train=[bold]")):
        error = "size mismatch [/x]"
        result = Result(
            folder=Path(str(index)),
            overrides=(value,),
            seconds=1.0,
            error=error,
            config=None,
            scores={"val/loss": None},
        )
        results.append(result)
    console = Console(width=100, record=True, file=StringIO())
    console.print(result_table(results, "val/loss"))
    shown = console.export_text()
    assert "[/data/a.jsonl,/data/b.jsonl]" in shown
    assert "[bold]" in shown
    assert "size mismatch [/x]" in shown
