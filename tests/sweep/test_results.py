import csv
import json
import re
from io import StringIO

import pytest

from qwenvl_lit.sweep.results import (
    draw,
    read_results,
    read_scores,
    report,
    result_table,
    save_result,
    varied,
)
from qwenvl_lit.types import DataError


def write_job(folder, number, *overrides, error=None, **scores):
    """A job that has ended; `scores` are of its best checkpoint, without their `val/`."""
    job = folder / str(number)
    save_result(job, ["adapter=lora", *overrides], seconds=61.04, error=error)
    best = {
        "step": 4,
        **{f"val/{name}": value for name, value in scores.items()},
        "monitor": "val/loss",
    }
    if scores:
        (job / "metrics.json").write_text(
            json.dumps({"fit": {"last": {"val/loss": 9.0}, "best": best}})
        )


@pytest.fixture
def ranks(tmp_path):
    """Twelve jobs: ranks 1 to 11, the fourth failed, the fifth with a loss that is not a number, and a job that did not end."""
    for number in range(11):
        if number == 3:
            write_job(tmp_path, number, "adapter.rank=4", error="CUDA out of memory")
        else:
            loss = None if number == 4 else 2 - number / 10
            write_job(
                tmp_path, number, f"adapter.rank={number + 1}", loss=loss, caption=number / 20
            )
    (tmp_path / "11").mkdir()
    return tmp_path


def test_jobs_are_read_in_the_order_they_were_made_and_only_those_that_ended(ranks):
    assert [result.folder.name for result in read_results(ranks)] == [
        str(number) for number in range(11)
    ]


def test_the_table_has_the_best_job_first_and_those_without_a_score_last(ranks):
    report(ranks, metric="val/loss", mode="min")
    rows = list(csv.DictReader((ranks / "sweep.csv").open()))
    assert list(rows[0]) == ["job", "adapter.rank", "val/loss", "val/caption", "seconds", "error"]
    assert [row["job"] for row in rows] == ["10", "9", "8", "7", "6", "5", "2", "1", "0", "3", "4"]
    assert (
        rows[0]["adapter.rank"],
        rows[0]["val/loss"],
        rows[0]["val/caption"],
        rows[0]["error"],
    ) == ("11", "1.0", "0.5", "")
    assert (rows[-2]["val/loss"], rows[-2]["error"]) == ("", "CUDA out of memory")


def test_the_largest_can_be_the_best(ranks):
    assert [result.folder.name for result in report(ranks, metric="val/caption", mode="max")][
        :2
    ] == ["10", "9"]
    assert [result.folder.name for result in report(ranks, metric="val/caption", mode="min")][
        :2
    ] == ["0", "1"]


def test_a_metric_that_no_job_has_is_an_error_that_names_those_there_are(ranks):
    with pytest.raises(DataError, match=r"sweep\.metric=val/cider: .* val/caption, val/loss"):
        report(ranks, metric="val/cider", mode="min")


def test_the_terminal_shows_what_was_varied_the_score_and_the_errors(ranks):
    from rich.console import Console

    console = Console(width=100, record=True, file=StringIO())
    console.print(result_table(report(ranks, metric="val/loss", mode="min"), "val/loss"))
    lines = [re.sub(r"\s*[│┃]\s*", "|", line) for line in console.export_text().splitlines()]
    assert lines[1] == "|job|adapter.rank|val/loss|time|error|"
    assert lines[3] == "|10|11|1|1:01||"
    assert lines[12] == "|3|4||1:01|CUDA out of memory|"


def test_scores_are_those_of_the_best_checkpoint_or_else_of_the_last_validation(tmp_path):
    assert read_scores(tmp_path) == {}
    last = {"step": 4, "val/loss": 2.0}
    for best, scores in (
        ({"step": 2, "val/loss": 1.5}, {"val/loss": 1.5}),
        ({"monitor": "val/x", "checkpoint": None}, {"val/loss": 2.0}),
    ):
        (tmp_path / "metrics.json").write_text(
            json.dumps({"fit": {"step": 4, "last": last, "best": best}})
        )
        assert read_scores(tmp_path) == scores


def test_what_all_jobs_have_in_common_was_not_varied():
    assert varied([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}]) == ["b"]
    assert varied([{"a": "1"}]) == []


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure that is saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **kwargs: (saved.extend(figure.axes), save(figure, *args, **kwargs)),
    )
    return saved


def test_numbers_that_are_far_apart_stand_on_a_log_axis(tmp_path, axes):
    for number, rate in enumerate(["1e-3", "1e-5", "1e-4"]):
        write_job(tmp_path, number, f"optim.lr={rate}", loss=number)
    draw(read_results(tmp_path), ["optim.lr"], "val/loss", tmp_path / "sweep.png")
    assert (axes[0].get_xlabel(), axes[0].get_ylabel(), axes[0].get_xscale()) == (
        "optim.lr",
        "val/loss",
        "log",
    )
    assert axes[0].lines[0].get_xydata().tolist() == [[1e-5, 1], [1e-4, 2], [1e-3, 0]]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["1e-05", "0.0001", "0.001"]
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_two_keys_are_a_line_for_each_value_of_the_shorter(tmp_path, axes):
    jobs = [(adapter, rank) for adapter in ("lora", "dora") for rank in (1, 2, 3)]
    for number, (adapter, rank) in enumerate(jobs):
        write_job(tmp_path, number, f"adapter={adapter}", f"adapter.rank={rank}", loss=number)
    draw(read_results(tmp_path), ["adapter", "adapter.rank"], "val/loss", tmp_path / "sweep.png")
    assert [(line.get_label(), line.get_xydata().tolist()) for line in axes[0].lines] == [
        ("adapter=lora", [[1, 0], [2, 1], [3, 2]]),
        ("adapter=dora", [[1, 3], [2, 4], [3, 5]]),
    ]
    assert axes[0].get_xscale() == "linear"


def test_choices_stand_side_by_side(tmp_path, axes):
    for number, adapter in enumerate(["lora", "lora_all"]):
        write_job(tmp_path, number, f"adapter={adapter}", loss=number)
    draw(read_results(tmp_path), ["adapter"], "val/loss", tmp_path / "sweep.png")
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["lora", "lora_all"]


def test_many_combinations_are_points_over_each_key(tmp_path, axes):
    for number in range(20):
        write_job(
            tmp_path,
            number,
            f"optim.lr={1e-5 * 1.3**number}",
            f"adapter.rank={number * 7 % 20 + 1}",
            loss=number % 5,
        )
    draw(read_results(tmp_path), ["optim.lr", "adapter.rank"], "val/loss", tmp_path / "sweep.png")
    assert [(panel.get_xlabel(), len(panel.collections[0].get_offsets())) for panel in axes] == [
        ("optim.lr", 20),
        ("adapter.rank", 20),
    ]
