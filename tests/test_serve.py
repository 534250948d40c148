"""The command `serve`, without what a running server does (`serving/`)."""

import logging
import re
from pathlib import Path

import pytest
from commands import compose_config
from omegaconf import OmegaConf

from qwenvl_lit import serve
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.cli.early_checks import check_values
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.runs.run import Run
from qwenvl_lit.types import DataError


def composed(*overrides):
    line = prepare("serve", ["model=qwen_vl_tiny", *overrides], run="needed")
    offer_groups(line)
    return compose_config("serve", *line.arguments)


@pytest.mark.parametrize("package", serve.PACKAGES)
def test_a_missing_package_is_one_line_with_the_command_of_pip(package, monkeypatch):
    monkeypatch.setattr(
        "qwenvl_lit.extras.find_spec", lambda name: None if name == package else object()
    )
    message = f"serve needs the package {package}, which is not installed; install the extra "
    with pytest.raises(ValueError, match=re.escape(f"{message}`serve`: pip install -e '.[serve]'")):
        serve.serve_here(OmegaConf.create())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "serve has no generation.num_beams, which is 4: set generation.num_"),
        ({"min_new_tokens": 2}, "serve has no generation.min_new_tokens, which is 2: set"),
        ({"stop_words_ids": [[5]]}, "serve has no generation.stop_words_ids, which is [[5]]"),
        ({"logits_processor": max}, "serve has no generation.logits_processor, which is <built-in"),
    ],
)
def test_settings_that_the_engine_has_not_are_refused_by_name(settings, message):
    serve.check_generation(Generation(do_sample=True, top_p=0.3, seed=1))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        serve.check_generation(Generation(**settings))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.port=70000", "serve.port must be a whole number, 0 or more, at most 65535"),
        ("serve.rows=0", "serve.rows must be a whole number, 1 or more"),
        ("serve.context=most", "serve.context must be a whole number"),
        ("serve.max_image_megapixels=500", "serve.max_image_megapixels must be a number, above 0"),
        ("serve.allowed_hosts=['http://a.example/']", "serve.allowed_hosts is a list of names"),
        ("serve.grace_s=-1", "serve.grace_s must be a number, 0 or more"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(override, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_values(composed(override))


def test_keys_come_from_the_file_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("QWENVL_LIT_KEYS", "/run/secrets/keys")
    assert composed().serve["keys"] == "/run/secrets/keys"
    monkeypatch.delenv("QWENVL_LIT_KEYS")
    assert composed().serve["keys"] is None


def test_a_server_for_others_without_keys_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        assert not serve.keys_of(None, host="127.0.0.1")
        assert not caplog.records
        assert not serve.keys_of(None, host="0.0.0.0")
    assert "serve.host=0.0.0.0 without serve.keys: everyone may use the model; serve.keys=F" in (
        caplog.text
    )
    with pytest.raises(DataError, match=r"^serve\.keys=none\.txt cannot be read"):
        serve.keys_of("none.txt", host="0.0.0.0")


@pytest.mark.parametrize(("mode", "is_warned_of"), [(0o600, False), (0o640, False), (0o644, True)])
def test_keys_that_every_user_can_read_are_warned_of(tmp_path, caplog, mode, is_warned_of):
    file = tmp_path / "keys.txt"
    file.write_text("first-key-1\n")
    file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert serve.keys_of(str(file), host="0.0.0.0") == ["first-key-1"]
    assert (f"chmod 600 {file}" in caplog.text) is is_warned_of


def test_a_wrong_address_is_found_before_missing_keys_are_warned_of(caplog):
    with pytest.raises(DataError, match="is an address of this machine"):
        serve.serve_here(composed("serve.host=203.0.113.77"))
    assert "serve.keys" not in caplog.text


@pytest.mark.parametrize(
    ("folder", "ckpt"),
    [
        ("outputs/train/mine", "outputs/train/mine/checkpoints/best.ckpt"),
        (None, "somewhere/mine/adapter_model.safetensors"),
        (None, "somewhere/mine"),
        (None, "somewhere/mine.ckpt"),
    ],
)
def test_a_model_has_the_name_of_its_folder(folder, ckpt):
    run = Run(config={}, checkpoint=Path(ckpt), folder=Path(folder) if folder else None)
    assert serve.model_name(OmegaConf.create({"ckpt": ckpt}), run) == "mine"
