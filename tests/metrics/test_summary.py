import json

from qwenvl_lit.metrics.summary import read_fit_summary


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
