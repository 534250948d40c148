from itertools import pairwise
from pathlib import Path

import pytest

from qwenvl_lit.sweep.plot import draw_scores
from qwenvl_lit.sweep.results import Result


def result(score: float, *overrides: str) -> Result:
    return Result(
        folder=Path(),
        overrides=overrides,
        seconds=1.0,
        error=None,
        config=None,
        scores={"val/loss": score},
    )


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure that is saved."""
    from matplotlib.figure import Figure

    saved = []
    savefig = Figure.savefig

    def record_and_save(figure, *args, **kwargs):
        saved.extend(figure.axes)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record_and_save)
    return saved


def tick_labels(axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_numbers_that_are_far_apart_stand_on_a_log_axis(tmp_path, axes):
    results = []
    for score, lr in enumerate(["1e-3", "1e-5", "1e-4"]):
        results.append(result(score, f"optim.lr={lr}"))
    draw_scores(results, ["optim.lr"], "val/loss", tmp_path / "sweep.png")
    assert axes[0].get_xlabel() == "optim.lr"
    assert axes[0].get_ylabel() == "val/loss"
    assert axes[0].get_xscale() == "log"
    assert axes[0].lines[0].get_xydata().tolist() == [[1e-5, 1], [1e-4, 2], [1e-3, 0]]
    assert tick_labels(axes[0]) == ["1e-05", "0.0001", "0.001"]
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_of_two_keys_the_one_with_more_values_is_the_axis(tmp_path, axes):
    results = []
    for adapter in ("lora", "dora"):
        for rank in (1, 2, 3):
            results.append(result(len(results), f"adapter={adapter}", f"adapter.rank={rank}"))
    draw_scores(results, ["adapter", "adapter.rank"], "val/loss", tmp_path / "sweep.png")
    assert [(line.get_label(), line.get_xydata().tolist()) for line in axes[0].lines] == [
        ("adapter=lora", [[1, 0], [2, 1], [3, 2]]),
        ("adapter=dora", [[1, 3], [2, 4], [3, 5]]),
    ]
    assert axes[0].get_xscale() == "linear"


def test_choices_stand_side_by_side(tmp_path, axes):
    results = [result(0, "adapter=lora"), result(1, "adapter=lora_all")]
    draw_scores(results, ["adapter"], "val/loss", tmp_path / "sweep.png")
    assert tick_labels(axes[0]) == ["lora", "lora_all"]


def test_many_combinations_are_points_in_a_panel_for_each_key(tmp_path, axes):
    results = []
    for number in range(20):
        values = (f"optim.lr={1e-5 * 1.3**number}", f"adapter.rank={number * 7 % 20 + 1}")
        results.append(result(number % 5, *values))
    draw_scores(results, ["optim.lr", "adapter.rank"], "val/loss", tmp_path / "sweep.png")
    assert [panel.get_xlabel() for panel in axes] == ["optim.lr", "adapter.rank"]
    assert [len(panel.collections[0].get_offsets()) for panel in axes] == [20, 20]


def test_long_values_do_not_cover_each_other_nor_the_lines(tmp_path, axes):
    results = []
    for adapter in ("lora", "dora"):
        for number in range(5):
            path = "/data/models/a_long_path" * 6 + f"/checkpoint_number_{number}"
            results.append(result(number, f"adapter={adapter}", f"model.path={path}"))
    draw_scores(results, ["adapter", "model.path"], "val/loss", tmp_path / "sweep.png")
    [drawn] = axes
    [legend] = drawn.figure.legends
    assert legend.get_window_extent().y1 < drawn.get_window_extent().y0
    for number, label in enumerate(drawn.get_xticklabels()):
        assert label.get_rotation() == 30
        assert label.get_text().replace("\n", "").endswith(f"number_{number}")
        extent = label.get_window_extent()
        assert legend.get_window_extent().y1 < extent.y0 < extent.y1 <= drawn.bbox.y0


def test_numbers_that_are_close_together_have_no_tick_each(tmp_path, axes):
    results = [result(number, f"optim.lr={number}") for number in (1, 1.01, 5)]
    draw_scores(results, ["optim.lr"], "val/loss", tmp_path / "sweep.png")
    extents = [label.get_window_extent() for label in axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(extents))
