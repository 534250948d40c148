"""A stranger's checkpoint, run folder, exported folder or adapter executes nothing."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qwenvl_lit import QwenVL
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.cli.resume import resumed
from qwenvl_lit.runs.run import (
    COMPOSED_CONFIG,
    USED_GROUPS,
    config_folder,
    find_run,
    stored_settings,
)
from qwenvl_lit.runs.stored_config import (
    allowed_targets,
    check_stored_config,
    trust_argument,
)
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.adapters.peft_files import adapter_node
from qwenvl_lit.types import DataError

EVIDENCE = "executed"  # the file that a target would write
ATTACK = {"_target_": "pathlib.Path.write_text", "_args_": [EVIDENCE, "x"]}
# Keys of a stored config, at any depth, that are handed to Hydra or to peft
PLACES = [
    ("model", "config"),
    ("model",),
    ("adapter",),
    ("adapter", "options", "rank_pattern"),
    ("adapter", "options", "loftq_config"),
    ("adapter", "targets"),
    ("adapter", "rank"),
    ("init",),
    ("init", "adapter"),
    ("data", "read"),
    ("data", "test", "mine"),
    ("metrics", "mine"),
    ("generation", "top_p"),
    ("optim",),
    ("trainer", "callbacks", 0),
]
COMMANDS = {"test": "needed", "predict": "needed", "chat": "needed", "export": "needed"}
COMMANDS |= {"serve": "needed"}
COMMANDS |= {"train": "start"}


@pytest.fixture
def config() -> dict:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return OmegaConf.to_container(compose("train"))


@pytest.fixture(autouse=True)
def nothing_was_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(EVIDENCE).exists()


def put(config: dict, key: tuple, value) -> dict:
    """`config` with `value` at `key`; what is missing on the way is created."""
    node = config
    for name, following in pairwise(key):
        if not isinstance(node, list) and not isinstance(node.get(name), dict | list):
            node[name] = [None] if following == 0 else {}
        node = node[name]
    node[key[-1]] = value
    return config


def checkpoint(file: Path, config: dict) -> Path:
    torch.save({"config": config, "state_dict": {}}, file)
    return file


@pytest.mark.parametrize(("target", "argument"), [("mine.Metric", " trust=true"), (None, "")])
def test_hints_of_commands_have_the_trust_that_a_class_of_the_user_needs(config, target, argument):
    metric = {"_target_": target or "qwenvl_lit.metrics.exact_match.ExactMatch"}
    assert trust_argument(put(config, ("metrics", "mine"), metric), USED_GROUPS) == argument
    other = {"metrics": {}, "callbacks": {"mine": {"_target_": target}} if target else {}}
    assert trust_argument(config | other) == argument
    assert trust_argument(config | other, USED_GROUPS) == ""


def test_configs_of_this_package_are_accepted(config):
    check_stored_config(config, "train")
    assert "qwenvl_lit.models.qwen_vl.family.QwenVLFamily" in allowed_targets()
    assert "lightning.Trainer" in allowed_targets()
    assert "pathlib.Path.write_text" not in allowed_targets()


@pytest.mark.parametrize("key", PLACES, ids=lambda key: ".".join(map(str, key)))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_of_a_stranger_is_refused_by_every_command(config, command, key):
    file = checkpoint(Path("evil.ckpt"), put(config, key, ATTACK))
    name = ".".join(map(str, key))
    with pytest.raises(DataError, match=rf"evil\.ckpt: {name}\._target_ names .*; trust=true"):
        prepare(command, [f"ckpt={file}"], run=COMMANDS[command])
    trusted = prepare(command, [f"ckpt={file}", "trust=true"], run=COMMANDS[command])
    assert trusted.run_groups


def test_a_checkpoint_of_a_stranger_is_refused_in_python(config):
    checkpoint(Path("evil.ckpt"), put(config, ("adapter",), ATTACK))
    with pytest.raises(DataError, match=r"evil\.ckpt: adapter\._target_ names"):
        QwenVL.load("evil.ckpt", device="cpu")


@pytest.mark.parametrize("argument", ["ckpt=evil", "predictions=evil"])
def test_a_run_folder_of_a_stranger_is_refused(config, argument):
    folder = Path("evil")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / "predictions.jsonl").touch()
    checkpoint(folder / "checkpoints/best.ckpt", config)
    OmegaConf.save(put(config, ("model",), ATTACK), folder / COMPOSED_CONFIG)
    with pytest.raises(DataError, match=r"model\._target_ names 'pathlib.Path.write_text'"):
        prepare("test", [argument], run="needed")


def test_an_exported_folder_of_a_stranger_is_refused():
    folder = Path("evil")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    settings = {"model": {"template": "chatml"}, "generation": ATTACK}
    (folder / "qwenvl_lit.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"evil/qwenvl_lit\.json: generation\._target_ names"):
        find_run("evil")


@pytest.mark.parametrize("key", ["rank_pattern", "layers_pattern", "target_modules", "r"])
def test_an_adapter_folder_of_a_stranger_is_refused(key):
    folder = Path("evil")
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"], key: ATTACK}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(DataError, match="evil"):
        find_run("evil")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"_target_": ["os", "system"]}, "_target_ names"),
        ("${oc.env:HOME}", "has the interpolation"),
        ("a ${ oc.decode:x } b", "has the interpolation"),
        ({"defaults": [{"/hydra/launcher": "submitit"}]}, "asks Hydra for other configs"),
    ],
)
def test_other_ways_to_reach_code_are_refused(config, value, message):
    with pytest.raises(DataError, match=f"evil: data.root.*{message}"):
        check_stored_config(put(config, ("data", "root"), value), "evil")


def test_interpolations_of_this_package_and_plain_references_are_kept(config):
    check_stored_config(put(config, ("data", "root"), "${paths.cache}/mine"), "mine")
    with pytest.raises(DataError, match="is not a mapping"):
        check_stored_config([1], "evil")


@pytest.mark.parametrize("key", PLACES, ids=lambda key: ".".join(map(str, key)))
def test_a_run_of_a_stranger_is_not_resumed(config, key):
    check_stored_config(config, "run")
    with pytest.raises(DataError, match=r"_target_ names 'pathlib\.Path\.write_text'"):
        check_stored_config(put(config, key, ATTACK), "run/.hydra/config.yaml")


def test_a_stored_config_of_a_stranger_is_checked_before_a_run_resumes(config):
    folder = Path("evil")
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(put(config, ("callbacks", "mine"), ATTACK), folder / COMPOSED_CONFIG)
    current = OmegaConf.create({"resume": "evil", "paths": {"run": "evil"}, "trust": False})
    with pytest.raises(DataError, match=r"config\.yaml: callbacks\.mine\._target_ names"):
        resumed(current)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("model", "max_length"), "x", "model.max_length is 'x', expected a whole number or null"),
        (("model", "surprise"), 1, "model.surprise is no argument of qwenvl_lit.*QwenVLFamily"),
        (("generation", "top_p"), [1], r"generation.top_p is \[1\], expected a number"),
        (("data", "validation"), {"a": 1}, "data.validation is {'a': 1}, expected text or a list"),
        (("generation", "compile"), "yes", "generation.compile is 'yes', expected"),
        (("trainer", "validate_every"), "often", "trainer.validate_every is 'often', expected a"),
        (("adapter", "train"), "all", "adapter.train is 'all', expected a list of text"),
        (
            ("model",),
            {"_target_": "lightning.Trainer"},
            "model._target_ names .* is no model",
        ),
        (("adapter",), "full", "adapter is 'full', expected a mapping"),
        (("data", "read"), {"_target_": "lightning.Trainer", "x": 1}, "data.read.x is no argument"),
        (
            ("model", "config"),
            {"_target_": "lightning.Trainer"},
            "model.config is .*, expected a mapping or null",
        ),
    ],
)
def test_an_argument_of_another_type_is_named(config, key, value, message):
    with pytest.raises(DataError, match=f"evil: {message}"):
        check_stored_config(put(config, key, value), "evil")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"surprise": 1}}, "model.surprise is no argument"),
        ({"generation": {"max_new_tokens": "many"}}, "generation.max_new_tokens is 'many'"),
        ({"generation": {"max_new_tokens": "${x}"}}, "has an interpolation"),
        ({"generation": [1]}, r"generation is \[1\], expected a JSON object"),
        ({"data": {}}, "data is unknown; expected model, generation, adapter, optim, trainer"),
        ({"trainer": {"max_epochs": "many"}}, "trainer.max_epochs is 'many'"),
        ({"adapter": {"rank": 4}}, "adapter has no _target_"),
    ],
)
def test_settings_of_an_exported_folder_are_checked(settings, message):
    folder = Path("evil")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "qwenvl_lit.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=rf"qwenvl_lit\.json:? {message}"):
        stored_settings(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", "8", "r is '8', expected a whole number"),
        ("lora_alpha", [1], r"lora_alpha is \[1\]"),
        ("rank_pattern", {"w1": ATTACK}, "rank_pattern is"),
        ("alpha_pattern", {"w1": "x"}, "alpha_pattern is"),
        ("layers_pattern", [1], r"layers_pattern is \[1\]"),
        ("target_modules", [ATTACK], "target_modules is"),
        ("megatron_config", {"a": 1}, "has megatron_config=.* is not used here"),
        ("megatron_core", "evil", "has megatron_core='evil', which is not used here"),
        ("loftq_config", ATTACK, "has loftq_config=.* is not used here"),
        ("eva_config", ATTACK, "has eva_config=.* is not used here"),
    ],
)
def test_a_setting_of_adapter_config_json_is_checked(key, value, message):
    folder = Path("evil")
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"], key: value}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=rf"adapter_config\.json:? {message}"):
        adapter_node(folder)


def test_an_option_of_peft_that_imports_a_module_is_refused():
    with pytest.raises(ValueError, match=r"adapter\.options has megatron_core; it may have"):
        LoRA(rank=2, alpha=4, dropout=0, targets="attention", options={"megatron_core": "evil"})
