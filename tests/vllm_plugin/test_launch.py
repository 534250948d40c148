"""The command that starts vLLM's server. vLLM itself is not needed for it."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from qwenvl_lit.runs.run import Run
from qwenvl_lit.serving.settings import ServeSettings
from qwenvl_lit.serving.vllm import launch as launching
from qwenvl_lit.serving.vllm.adapters import adapter_folder
from qwenvl_lit.serving.vllm.launch import VllmSettings, export, launch, served_folder
from qwenvl_lit.types import DataError


@pytest.fixture(autouse=True)
def _vllm_is_installed(monkeypatch):
    monkeypatch.setattr("qwenvl_lit.extras.find_spec", lambda package: True)


@pytest.fixture
def adapter(tmp_path):
    """Returns a function that writes an adapter folder."""

    def write(name="a", layer="transformer.h.0.attn.c_attn", system=None, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        stored = {"peft_type": "LORA", "r": 12, "target_modules": ["c_attn"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(stored))
        tensors = {f"base_model.model.{layer}.lora_A.weight": zeros(12, 4)}
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"model": {"system": system}, "generation": {}}
        (folder / "qwenvl_lit.json").write_text(json.dumps(settings))
        return folder

    return write


def started(model="models/mine", settings=None, server=None, adapters=None, **options):
    options["adapters"] = {name: adapter_folder(path) for name, path in (adapters or {}).items()}
    return launch(model, settings or VllmSettings(), server or ServeSettings(), **options)


def option(command, name: str) -> str | None:
    """The value after an argument; None if the argument is missing."""
    if name not in command.arguments:
        return None
    return command.arguments[command.arguments.index(name) + 1]


def test_by_default_no_address_is_fetched_and_nobody_else_connects():
    command = started()
    assert option(command, "--allowed-media-domains") == "none.invalid"
    assert option(command, "--host") == "127.0.0.1"
    assert command.environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert command.environment["VLLM_MAX_IMAGE_PIXELS"] == "50000000"
    assert command.environment["QWENVL_LIT_MAX_BODY_BYTES"] == "32000000"
    assert command.environment["QWENVL_LIT_BODY_SECONDS"] == "30.0"
    assert option(command, "--middleware") == "qwenvl_lit.serving.vllm.gate.RequestGate"
    assert option(command, "--allowed-origins") == "[]"


def test_the_environment_of_the_user_does_not_loosen_the_limits(monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    environment = started().environment
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert environment["VLLM_NO_USAGE_STATS"] == "0"


def test_settings_become_arguments_and_auto_leaves_them_to_vllm():
    command = started()
    for name in ("--max-num-seqs", "--max-model-len", "--tensor-parallel-size", "--dtype"):
        assert option(command, name) is None
    server = ServeSettings(rows=7, context=4096, name="mine", port=9000, allowed_hosts=["a.b"])
    settings = VllmSettings(data_parallel_size=8, arguments=["--enforce-eager"])
    command = started(settings=settings, server=server, dtype="bfloat16", system="Be brief.")
    assert option(command, "--max-num-seqs") == "7"
    assert option(command, "--max-model-len") == "4096"
    assert option(command, "--data-parallel-size") == "8"
    assert option(command, "--served-model-name") == "mine"
    assert option(started(name="of the run"), "--served-model-name") == "of the run"
    assert option(command, "--allowed-media-domains") == "a.b"
    assert option(command, "--dtype") == "bfloat16"
    assert json.loads(option(command, "--additional-config")) == {
        "qwenvl_lit": {"system": "Be brief."}
    }
    assert command.arguments[-1] == "--enforce-eager"


def test_keys_stay_in_their_file_where_other_users_do_not_see_them(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_API_KEY", "of-another-server")
    monkeypatch.chdir(tmp_path)
    environment = started(server=ServeSettings(keys="keys.txt")).environment
    assert environment["QWENVL_LIT_KEYS"] == str(tmp_path / "keys.txt")
    assert "VLLM_API_KEY" not in environment
    assert "QWENVL_LIT_KEYS" not in started().environment


def test_adapters_get_one_slot_more_than_their_number_and_the_largest_rank(adapter):
    folders = {"a": adapter("a"), "b": adapter("b", rank_pattern={"h.0": 20})}
    command = started(adapters=folders)
    assert option(command, "--max-loras") == "3"
    assert option(command, "--max-lora-rank") == "32"
    start = command.arguments.index("--lora-modules")
    expected = [f"{name}={folder}" for name, folder in folders.items()]
    assert command.arguments[start + 1 : start + 3] == expected


def test_the_adapter_of_a_run_is_that_of_its_best_checkpoint(adapter, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    folder = adapter("run/checkpoints/best_adapter")
    assert adapter_folder(tmp_path / "run") == folder
    with pytest.raises(DataError, match="no adapter: expected a folder with adapter_config"):
        adapter_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "transformer.visual.attn_pool.attn.q_proj"}, "adapts transformer.visual"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["wte"]}, "whole tensors of wte"),
        ({"r": 513}, "rank is above 512"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_named(adapter, changes, message):
    folder = adapter(**changes)
    with pytest.raises(DataError, match=f"{folder} cannot be served.*{message}.*merged"):
        started(adapters={"a": folder})


def test_the_system_message_of_the_adapters_is_that_of_the_server(adapter):
    folders = {"a": adapter("a", system=""), "b": adapter("b", system="")}
    additional = option(started(adapters=folders), "--additional-config")
    assert json.loads(additional) == {"qwenvl_lit": {"system": ""}}
    folders["c"] = adapter("c", system="Be brief.")
    with pytest.raises(DataError, match=r"a was trained with system='', and c with 'Be brief\.'"):
        started(adapters=folders)
    assert option(started(adapters=folders, system="x"), "--additional-config") is not None


def test_a_run_is_exported_once_until_its_checkpoint_changes(tmp_path, monkeypatch):
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    commands = []

    class Done:
        returncode = 0

    def run_export(command, stdout):
        commands.append(command)
        out = Path(next(item for item in command if item.startswith("out="))[4:])
        out.mkdir(exist_ok=True)
        (out / "qwenvl_lit.json").touch()
        later = checkpoint.stat().st_mtime + 1
        os.utime(out / "qwenvl_lit.json", (later, later))
        return Done()

    monkeypatch.setattr(launching.subprocess, "run", run_export)
    run = Run(config={}, checkpoint=checkpoint, folder=tmp_path / "run")
    folder = served_folder("latest", run, tmp_path / "cache")
    assert folder == checkpoint.parent / "best_served"
    for _ in range(2):
        export(checkpoint, folder)
    assert len(commands) == 1
    os.utime(checkpoint, (2**31, 2**31))
    export(checkpoint, folder)
    assert len(commands) == 2


def test_a_full_model_is_served_as_it_is(tmp_path):
    run = Run(config={}, checkpoint=None, folder=None)
    assert served_folder(str(tmp_path), run, tmp_path / "cache") == tmp_path


def test_settings_without_counterpart_are_refused_not_ignored():
    with pytest.raises(ValueError, match=r"engine=vllm has no serve\.queue"):
        started(server=ServeSettings(queue=7))


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"vllm\.data_parallel_size"):
        VllmSettings(data_parallel_size=0)
