import pytest
from PIL import Image
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.curves import Curves, _plot, draw_curves, smooth
from qwenvl_lit.callbacks.run_log import RunLog

DATA = ToyData([conversation(i, says="yes") for i in range(8)])


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_smoothing_has_no_bias_towards_the_first_value():
    assert smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2, 2, 2])
    assert smooth([0.0, 1.0], 0.9) == pytest.approx([0, 0.1 / 0.19])
    assert smooth([], 0.9) == []


def test_values_that_are_not_finite_do_not_end_the_smoothed_curve():
    nan, inf = float("nan"), float("inf")
    assert smooth([0.0, nan, inf, 1.0], 0.9) == pytest.approx(
        [0, nan, inf, 0.1 / 0.19], nan_ok=True
    )


@pytest.mark.parametrize("count", [31, 72, 1000, 20_000])
def test_the_smoothed_curve_is_never_far_behind(count):
    steps = list(range(count))
    falling = [1 - step / count for step in steps]
    [axes] = _plot("loss", (steps, falling), ([], [])).axes
    raw, smoothed = (line.get_ydata() for line in axes.lines)
    assert smoothed[0] == raw[0]
    lag = max(low - high for low, high in zip(smoothed, raw, strict=True))
    assert lag <= max(0.02, 1.6 / count)


@pytest.mark.parametrize("name", ["loss", "learning_rate"])
def test_a_single_value_is_seen(name):
    [axes] = _plot(name, ([10], [0.5]), ([], [])).axes
    [line] = axes.lines
    assert line.get_marker() == "o"
    assert list(axes.get_xlim()) == [9, 11]


def test_a_long_name_fits_beside_its_axis():
    figure = _plot("a_metric_of_a_user_" * 4, ([], []), ([1, 2], [0.5, 0.6]))
    figure.draw_without_rendering()
    label = figure.axes[0].yaxis.label.get_window_extent()
    assert 0 <= label.y0 < label.y1 <= figure.bbox.height


def test_each_scalar_is_one_image_with_its_validation(tmp_path):
    common = {"total": 2, "epoch": 0, "grad_norm": None}
    records = [
        {**common, "step": 1, "loss": 2.0, "elapsed_s": 1, "remaining_s": 1},
        {**common, "step": 2, "loss": 1.0, "elapsed_s": 2, "remaining_s": 0},
        {"step": 2, "epoch": 0, "val/loss": 1.5, "val/exact_match": 0.25},
    ]
    files = draw_curves(records, tmp_path / "curves")
    assert names(tmp_path / "curves") == ["exact_match.png", "loss.png"]
    assert Image.open(files[0]).size == (768, 480)


def test_without_records_nothing_is_drawn(tmp_path):
    assert draw_curves([], tmp_path / "curves") == []
    assert not (tmp_path / "curves").exists()


def test_training_draws_its_curves_at_the_end(tmp_path):
    trainer(tmp_path, RunLog(), Curves(), max_epochs=1).fit(ToyTask(), DATA)
    assert names(tmp_path / "curves") == ["learning_rate.png", "loss.png"]


def test_curves_are_drawn_after_an_error_in_training(tmp_path):
    class Fails(ToyTask):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, RunLog(), Curves(), max_epochs=1).fit(Fails(), DATA)
    assert names(tmp_path / "curves") == ["learning_rate.png", "loss.png"]
