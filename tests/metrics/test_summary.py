import json

import pytest

from qwenvl_lit.metrics.summary import read_fit_summary, scores_to_update


def write_metrics(folder, **fit):
    (folder / "metrics.json").write_text(json.dumps({"fit": fit}))


def test_a_run_that_has_not_written_its_scores_has_none(tmp_path):
    summary = read_fit_summary(tmp_path)
    assert summary.scores == {}
    assert summary.score_names == []


def test_scores_are_those_of_the_best_checkpoint(tmp_path):
    best = {"step": 2, "val/loss": 1.5, "monitor": "val/loss"}
    write_metrics(tmp_path, best=best, last={"step": 4, "val/loss": 2.0, "val/caption": None})
    summary = read_fit_summary(tmp_path)
    assert summary.scores == {"val/loss": 1.5}
    assert summary.score_names == ["val/loss", "val/caption"]
    assert (summary.best["step"], summary.last["step"]) == (2, 4)


def test_without_a_best_checkpoint_scores_are_those_of_the_last_validation(tmp_path):
    best = {"monitor": "val/x", "checkpoint": None}
    write_metrics(tmp_path, best=best, last={"step": 4, "val/loss": 2.0})
    assert read_fit_summary(tmp_path).scores == {"val/loss": 2.0}
    write_metrics(tmp_path, best=None, last={"step": 4, "val/loss": 2.0})
    assert read_fit_summary(tmp_path).scores == {"val/loss": 2.0}


DAMAGED = [b"", b'{"fit": ', b"[]", b"\xff"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_run_with_a_damaged_file_counts_as_one_without_scores(tmp_path, caplog, content):
    (tmp_path / "metrics.json").write_bytes(content)
    assert read_fit_summary(tmp_path).scores == {}
    [warning] = caplog.records
    assert "metrics.json cannot be read" in warning.getMessage()
    assert (tmp_path / "metrics.json").read_bytes() == content


@pytest.mark.parametrize(
    "fit", [[], "fit", {"best": 3, "last": []}, {"last": {"val/loss": "low", "val/box": {}}}]
)
def test_scores_of_wrong_types_are_left_out(tmp_path, fit):
    (tmp_path / "metrics.json").write_text(json.dumps({"fit": fit}))
    assert read_fit_summary(tmp_path).scores == {}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_set_aside_before_scores_are_written(tmp_path, caplog, content):
    (tmp_path / "metrics.json").write_bytes(content)
    assert scores_to_update(tmp_path) == {}
    assert (tmp_path / "metrics.json.broken").read_bytes() == content
    assert "It is now metrics.json.broken" in caplog.text


def test_the_parts_of_a_sound_file_are_kept(tmp_path):
    write_metrics(tmp_path, last={"val/loss": 1.0})
    assert scores_to_update(tmp_path) == {"fit": {"last": {"val/loss": 1.0}}}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
