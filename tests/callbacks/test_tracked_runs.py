"""Experiment trackers: what they get, and that a resumed run continues there as the same one."""

import json
import random
from zipfile import ZipFile

import lightning
import pytest
from commands import compose_config
from lightning.pytorch.loggers import CSVLogger

from qwenvl_lit import build
from qwenvl_lit.callbacks.tracked_runs import FILE, RUN_ID, TrackedRuns
from qwenvl_lit.types import DataError

CONFIG = {"seed": 3, "optim": {"lr": 0.1}}


class Module(lightning.LightningModule):
    config = CONFIG


def start(folder, trackers) -> None:
    """What happens to trackers when a training starts."""
    trainer = lightning.Trainer(default_root_dir=folder, logger=False, accelerator="cpu")
    TrackedRuns(trackers).on_fit_start(trainer, Module())


def composed(folder, *overrides):
    return compose_config("train", *overrides, f"paths.run={folder}")


def test_a_resumed_run_continues_as_the_same_run_of_its_trackers(tmp_path, monkeypatch):
    monkeypatch.setitem(RUN_ID, "lightning.pytorch.loggers.CSVLogger", "version")
    config = composed(tmp_path, "logger=csv")
    first = build.loggers(config)
    first["csv"]._version = "mine"
    start(tmp_path, first)
    assert json.loads((tmp_path / FILE).read_text()) == {"csv": "mine"}
    assert first["csv"].experiment.hparams == CONFIG
    again = build.loggers(config)
    assert (again["csv"].version, again["csv"].save_dir) == ("mine", str(tmp_path))
    start(tmp_path, again)
    assert again["csv"].experiment.hparams == {}, "a tracker may refuse settings that have changed"


def test_loggers_that_are_no_trackers_are_left_alone(tmp_path):
    trainer = build.trainer(composed(tmp_path, "logger=csv", "strategy=cpu"))
    assert isinstance(trainer.logger, CSVLogger)
    assert not any(isinstance(each, TrackedRuns) for each in trainer.callbacks)


def test_a_damaged_list_of_ids_is_named(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match=rf"{FILE}.* it is not JSON"):
        build.loggers(composed(tmp_path, "logger=csv"))


@pytest.mark.parametrize(
    ("uri", "expected"), [(None, "sqlite:///mlflow.db"), ("http://tracker:5000",) * 2]
)
def test_mlflow_logs_where_its_own_commands_look(uri, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert composed(tmp_path, "logger=mlflow").logger.mlflow.tracking_uri == expected


def test_mlflow_has_the_settings_and_both_parts_of_a_resumed_run(tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = composed(tmp_path, "logger=mlflow")
    for step in (1, 2):
        trackers = build.loggers(config)
        start(tmp_path, trackers)
        trackers["mlflow"].log_metrics({"loss": 1 / step}, step=step)
        trackers["mlflow"].finalize("success")
    store = client(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = store.search_runs([store.get_experiment_by_name("qwenvl_lit").experiment_id])
    assert run.data.params == {"seed": "3", "optim/lr": "0.1"}
    history = store.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 0.5)]


def test_mlflow_that_refuses_an_address_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-store://x")
    with pytest.raises(ValueError, match=r"^logger\.mlflow: .*no-such-store"):
        build.loggers(composed(tmp_path, "logger=mlflow"))


def test_comet_writes_to_the_run_folder_without_the_network(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    for step in (1, 2):
        time = f"logger.comet.offline_directory={tmp_path}/comet_{step}"  # which the file has
        random.seed(3)
        trackers = build.loggers(composed(tmp_path, "logger=comet", time))
        start(tmp_path, trackers)
        trackers["comet"].log_metrics({"loss": 1 / step}, step=step)
        trackers["comet"].experiment.end()
    key = json.loads((tmp_path / FILE).read_text())["comet"]
    archives = sorted(tmp_path.glob(f"comet_*/{key}*.zip"))
    assert len(archives) == 2, "both name the same experiment, to which `comet upload` adds them"
    written = b"".join(ZipFile(file).read("messages.json") for file in archives)
    assert written.count(b'"metricName":"loss"') == 2


def test_comet_without_a_key_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"^logger\.comet: Comet.ml requires an API key"):
        build.loggers(composed(tmp_path, "logger=comet"))
