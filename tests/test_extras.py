"""A missing optional package is one line, which names the extra that installs it."""

import re
import tomllib
from pathlib import Path

import pytest
from commands import compose_config
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from qwenvl_lit import build
from qwenvl_lit.cli.choices import PLUGINS
from qwenvl_lit.cli.early_checks import check_packages
from qwenvl_lit.cli.hints import explain
from qwenvl_lit.extras import EXTRAS, require
from qwenvl_lit.models.quantization import bnb_config

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture(autouse=True)
def no_optional_package_is_installed(monkeypatch):
    monkeypatch.setattr("qwenvl_lit.extras.find_spec", lambda package: None)


def test_each_package_is_in_the_extra_that_its_message_names():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package in [re.split("[>=]", requirement)[0] for requirement in extras[extra]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logger=wandb"], r"logger=wandb needs .* wandb, .*pip install -e '\.\[wandb\]'"),
        (["logger=tensorboard"], r"logger=tensorboard needs .* '\.\[tensorboard\]'"),
        (["logger=mlflow"], r"logger=mlflow needs .* mlflow, .* '\.\[mlflow\]'"),
        (["logger=comet"], r"logger=comet needs .* comet_ml, .* '\.\[comet\]'"),
        (["logger=[csv,wandb]"], r"logger=wandb needs"),
        (["model=qwen_vl_chat", "adapter=qlora"], r"adapter=qlora .*'\.\[quant\]'"),
        (["model=qwen_vl_chat", "model.load_in_4bit=true"], r"model.load_in_4bit=true needs"),
    ],
)
def test_a_choice_that_needs_a_missing_package_is_refused_with_its_extra(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_packages(compose_config("train", *overrides))


@pytest.mark.parametrize("command", ["train", "check"])
def test_defaults_need_no_optional_package(command):
    check_packages(compose_config(command))


@pytest.mark.parametrize("choice", PLUGINS)
def test_a_launcher_or_sweeper_of_a_missing_package_is_refused_with_its_extra(choice):
    error = MissingConfigException(f"Could not find {choice!r}", missing_cfg_file=choice)
    group, _, name = choice.rpartition("/")
    message = explain("train", [], error)
    assert message.startswith(f"{group}={name} needs the package {PLUGINS[choice]}, ")
    assert f"pip install -e '.[{EXTRAS[PLUGINS[choice]]}]'" in message


def test_quantization_from_python_names_the_extra():
    with pytest.raises(ValueError, match=r"a quantized model needs .* '\.\[quant\]'"):
        bnb_config({}, dtype=None, skip=())


def test_a_package_without_an_extra_is_installed_by_its_name():
    with pytest.raises(ValueError, match=r"mine needs the package nltk, .*: pip install nltk$"):
        require("nltk", "mine")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "_target_=own_metric.Rouge cannot be imported: there is no own_metric; check"),
        ("import no_such_package", "_target_=own_metric.Rouge needs the package no_such_package"),
    ],
)
def test_a_class_that_cannot_be_imported_is_one_line(source, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / "own_metric.py").write_text(source)
    config = OmegaConf.create({"metrics": {"rouge": {"_target_": "own_metric.Rouge"}}})
    with pytest.raises(ValueError, match=re.escape(message)):
        build.metrics(config)


def test_an_option_of_lightning_that_needs_a_package_names_its_key(tmp_path):
    target = "lightning.pytorch.loggers.MLFlowLogger"
    config = compose_config(
        "train", "logger=none", f"+logger.mine._target_={target}", f"paths.run={tmp_path}"
    )
    with pytest.raises(ValueError, match=r"^logger\.mine: Requirement 'mlflow.*pip install"):
        build.trainer(config)
