"""`serve engine=vllm`: the command that it starts, and what it refuses. vLLM is not needed."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from commands import compose_config
from omegaconf import OmegaConf
from safetensors.torch import save_file
from scripted import tiny_checkpoint
from torch import zeros

from qwenvl_lit import serve
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.cli.early_checks import check_values
from qwenvl_lit.cli.vllm_server import refuse_vllm_settings
from qwenvl_lit.serving.vllm import launch as launching
from qwenvl_lit.types import DataError


@pytest.fixture(autouse=True)
def _vllm_is_installed(monkeypatch):
    monkeypatch.setattr("qwenvl_lit.extras.find_spec", lambda package: True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a full model."""
    return tiny_checkpoint(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture
def exports(monkeypatch):
    """The arguments of exports, which write nothing but the settings of their folder."""
    commands = []

    class Done:
        returncode = 0

    def export(command, stdout):
        arguments = dict(argument.split("=", 1) for argument in command[3:])
        commands.append(arguments)
        out = Path(arguments["out"])
        out.mkdir()
        (out / "qwenvl_lit.json").write_text('{"model": {}, "generation": {}}')
        return Done()

    monkeypatch.setattr(launching.subprocess, "run", export)
    return commands


def run_folder(folder: Path, **model) -> Path:
    """A run of qwen_vl_tiny with a checkpoint of its best step and its adapter."""
    config = OmegaConf.to_container(compose_config("train", "data=jsonl"))
    config["model"] = model if "_target_" in model else {**config["model"], **model}
    config["model"]["special_tokens"] = None
    stored = OmegaConf.to_yaml(OmegaConf.create(config))
    adapter = folder / "checkpoints/best_adapter"
    for file in (folder / ".hydra/config.yaml", folder / "config.yaml"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(stored)
    adapter.mkdir(parents=True)
    (folder / "checkpoints/best.ckpt").write_bytes(b"weights")
    peft = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["c_attn"]}
    (adapter / "adapter_config.json").write_text(json.dumps(peft))
    tensor = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": zeros(8, 4)}
    save_file(tensor, adapter / "adapter_model.safetensors")
    return folder


def composed(*arguments: str, engine="vllm"):
    line = prepare("serve", [*arguments, f"engine={engine}", "serve.port=0"], run="needed")
    offer_groups(line)
    return compose_config("serve", *line.arguments), line.arguments


def launched(*arguments: str):
    config, prepared = composed(*arguments)
    check_values(config)
    return serve.launch_of(config, prepared)


def option(command, name: str) -> str | None:
    """The value after an argument; None if the argument is missing."""
    if name not in command.arguments:
        return None
    return command.arguments[command.arguments.index(name) + 1]


def test_a_full_model_is_served_where_it_is(model, capsys):
    command = launched(f"ckpt={model}", "vllm.arguments=[--enforce-eager,--seed=7,--max-log-len,7]")
    assert command.arguments[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    assert option(command, "--served-model-name") == "tiny"
    assert option(command, "--dtype") == "bfloat16"
    assert command.arguments[-4:] == ["--enforce-eager", "--seed=7", "--max-log-len", "7"]
    for name in ("--override-generation-config", "--additional-config", "--enable-lora"):
        assert option(command, name) is None
    shown, address = capsys.readouterr().out.splitlines()
    port = option(command, "--port")
    assert int(port) > 0
    assert address.startswith(f"http://127.0.0.1:{port}/v1 for OpenAI clients")
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS=0" in shown
    assert shown.endswith("--enforce-eager --seed=7 --max-log-len 7")


def test_a_published_model_is_served_with_adapters_of_runs(model, tmp_path, caplog):
    run = run_folder(tmp_path / "my runs, of May/shop", system="Be brief.")
    command = launched(
        "model=qwen_vl_chat",
        f"model.path={model}",
        f"adapters={{shop: '{run}', docs: '{run}/checkpoints/best.ckpt'}}",
        "vllm.tensor_parallel_size=2",
    )
    assert command.arguments[4] == str(model)
    assert option(command, "--served-model-name") == "tiny"
    assert option(command, "--tensor-parallel-size") == "2"
    start = command.arguments.index("--lora-modules")
    folder = run / "checkpoints/best_adapter"
    assert command.arguments[start + 1 : start + 3] == [f"shop={folder}", f"docs={folder}"]
    assert option(command, "--max-loras") == "3"
    system = {"qwenvl_lit": {"system": "Be brief."}}
    assert json.loads(option(command, "--additional-config")) == system
    assert not caplog.records


def test_adapters_that_do_not_go_together_are_named(model, tmp_path, caplog):
    brief = run_folder(tmp_path / "brief", system="Be brief.")
    long = run_folder(tmp_path / "long", system="", path="Qwen/Qwen-VL")
    base = ["model=qwen_vl_chat", f"model.path={model}"]
    with pytest.raises(DataError, match=r"brief was trained with system='Be brief\.', and long"):
        launched(*base, f"adapters={{brief: {brief}, long: {long}}}")
    command = launched(*base, f"adapters={{brief: {brief}, long: {long}}}", "model.system=Hi")
    assert json.loads(option(command, "--additional-config")) == {"qwenvl_lit": {"system": "Hi"}}
    assert "adapter long was trained on Qwen/Qwen-VL, and" in caplog.text
    config = OmegaConf.load(long / "config.yaml")
    config.init = {"checkpoint": "/runs/first/checkpoints/best.ckpt"}
    (long / "config.yaml").write_text(OmegaConf.to_yaml(config))
    shutil.rmtree(long / "checkpoints/best_adapter")  # such a run does not write one
    for source in (long, long / "checkpoints/best.ckpt"):
        with pytest.raises(DataError, match=r"its run started from /runs/first/.*ckpt="):
            launched(*base, f"adapters={{long: '{source}'}}")


def test_a_run_is_exported_with_the_settings_of_the_command_line(tmp_path, exports):
    run = run_folder(tmp_path / "run")
    first = launched(f"ckpt={run}", "model.system=Be brief.", "serve.name=mine")
    assert first.arguments[4] == str(run / "checkpoints/best_served")
    assert option(first, "--served-model-name") == "mine"
    expected = {"ckpt": str(run / "checkpoints/best.ckpt"), "compare": "none", "verify": "True"}
    assert exports[0].items() >= expected.items()
    assert "model.system" not in exports[0]
    again = launched(f"ckpt={run}")
    assert again.arguments[4] == first.arguments[4]
    assert option(again, "--served-model-name") == "run"
    assert len(exports) == 1
    other = launched(f"ckpt={run}", "model.dtype=bfloat16", "verify=false")
    assert other.arguments[4] != first.arguments[4]
    assert exports[1].items() >= {"model.dtype": "bfloat16", "verify": "False"}.items()
    assert len(exports) == 2
    other_adapter = launched(f"ckpt={run}/checkpoints/best_adapter", f"paths.cache={tmp_path}")
    assert len(exports) == 3
    assert Path(other_adapter.arguments[4]).is_relative_to(run / "checkpoints")


def test_mistakes_are_found_before_a_run_is_exported(tmp_path, exports):
    run = run_folder(tmp_path / "run", system="Be brief.")
    other = run_folder(tmp_path / "other", system="")
    for argument in (f"adapters={{a: {other}}}", f"adapters={{run: {run}}}", "serve.queue=7"):
        with pytest.raises(ValueError, match=r"the model was trained with|already|no serve\.queue"):
            launched(f"ckpt={run}", argument)
    assert exports == []


def test_a_failed_export_is_one_line(tmp_path, monkeypatch):
    class Failed:
        returncode = 1

    monkeypatch.setattr(launching.subprocess, "run", lambda command, stdout: Failed())
    run = run_folder(tmp_path / "run")
    with pytest.raises(DataError, match=r"best\.ckpt could not be exported for vLLM"):
        launched(f"ckpt={run}")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (
            ["generation=sample", "generation.temperature=0.5"],
            "--override-generation-config",
            {"temperature": 0.5, "top_p": 0.3, "top_k": 0}
            | {"max_tokens": 512, "repetition_penalty": 1.0},
        ),
        (
            ["generation.max_new_tokens=7"],
            "--override-generation-config",
            {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
            | {"max_tokens": 7, "repetition_penalty": 1.0},
        ),
        (["model.system=none"], "--additional-config", {"qwenvl_lit": {"system": "none"}}),
        (
            ["model.system=null"],
            "--additional-config",
            {"qwenvl_lit": {"system": "You are a helpful assistant."}},
        ),
    ],
)
def test_answers_and_system_message_of_the_command_line_count(model, arguments, name, value):
    assert json.loads(option(launched(f"ckpt={model}", *arguments), name)) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device=cuda:1"], "device=cuda:1 is for engine=own; for engine=vllm the variable CUDA_"),
        (["model.load_in_4bit=true"], "model.load_in_4bit is for engine=own; leave it out"),
        (["model.device_map=auto"], "model.device_map is for engine=own; leave it out"),
        (["model.template=raw"], "engine=vllm reads model.template in the model's folder: leave"),
        (["model.path=elsewhere"], "engine=vllm reads model.path in the model's folder"),
        (["generation.num_beams=4"], "engine=vllm has no generation.num_beams, which is 4: set"),
        (["generation.seed=1"], "engine=vllm has no generation.seed: leave it out; requests have"),
        (["serve.context=9000"], "serve.context=9000 is more than the 2048 tokens that the model"),
        (["serve.queue=7"], "engine=vllm has no serve.queue: vLLM lets all requests wait"),
        (["model.dtype=int8"], "dtype is torch's name of a floating-point type"),
        (["adapters=runs/a"], "adapters=runs/a is no mapping; write adapters='{NAME: FOLDER,"),
        (["adapters={a: none/such}"], "adapters: none/such does not exist; expected a run or an"),
        (["adapters={a: null}"], "adapters: a: None is not NAME: FOLDER; write adapters='{NAME"),
        (["serve.keys=none.txt"], "serve.keys=none.txt cannot be read (No such file or"),
        (["vllm.arguments={a: b}"], "vllm.arguments is a list of arguments as vLLM takes them"),
        (["vllm.tensor_parallel_size=0"], "vllm.tensor_parallel_size must be a whole number"),
        (["vllm.gpu_memory_utilization=90"], "vllm.gpu_memory_utilization must be a number"),
    ],
)
def test_what_vllm_does_not_have_is_refused_by_name(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        launched(f"ckpt={model}", *arguments)


def test_a_model_without_stored_weights_is_refused():
    for arguments in (["model=qwen_vl_tiny"], ["model=qwen_vl_chat", "model.weights=random"]):
        with pytest.raises(DataError, match=r"^engine=vllm needs stored weights.*model\.path="):
            launched(*arguments)


def test_other_families_are_served_by_vllm_without_this_package(tmp_path):
    with pytest.raises(DataError, match=r"this is Qwen3-VL, which vLLM serves without this"):
        launched("model=qwen3_vl_8b")
    tiny = OmegaConf.to_container(compose_config("train", "data=jsonl", "model=qwen2_5_vl_tiny"))
    run = run_folder(tmp_path / "run", **tiny["model"])
    steps = rf"export ckpt={run}/checkpoints/best\.ckpt out=FOLDER, vllm serve FOLDER"
    with pytest.raises(DataError, match=f"this is Qwen2.5-VL.*{steps}"):
        launched(f"ckpt={run}")


def test_a_taken_port_is_said_before_anything_is_exported(tmp_path, exports):
    run = run_folder(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config, arguments = composed(f"ckpt={run}")
        config.serve.port = port
        with pytest.raises(DataError, match=rf"serve\.port={port}: .*in use; choose another port"):
            serve.launch_of(config, arguments)
    assert exports == []


def test_a_model_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"^none/such is no folder.*could not be fetched|download="):
        launched("model=qwen_vl_chat", "model.path=none/such", "model.download=false")


def test_a_name_is_given_once(model, tmp_path):
    run = run_folder(tmp_path / "run")
    with pytest.raises(DataError, match="tiny is the name of the model already"):
        launched("model=qwen_vl_chat", f"model.path={model}", f"adapters={{tiny: {run}}}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=qwen_vl_chat"], r"engine=vllm needs the package vllm.* own, .*'\.\[vllm\]'"),
        (["model=qwen_vl_chat", "serve.queue=5"], r"engine=vllm has no serve\.queue"),
        (["model=qwen_vl_chat", "device=cpu"], r"device=cpu is for engine=own"),
        (["model=qwen3_vl_tiny"], r"engine=vllm is for Qwen-VL, and this is Qwen3-VL"),
        (["model=qwen_vl_chat", "serve.keys=none.txt"], r"serve\.keys=none\.txt cannot be read"),
        (["model=qwen_vl_chat", "adapters={a: null}"], r"adapters: a: None is not NAME: FOLDER"),
    ],
)
def test_without_vllm_mistakes_are_named_before_it(monkeypatch, arguments, message):
    monkeypatch.setattr("qwenvl_lit.extras.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"^{message}"):
        launched(*arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("adapters={a: b}", "adapters is for engine=vllm; engine=own serves one model: ckpt="),
        ("vllm.data_parallel_size=2", "vllm.data_parallel_size is for engine=vllm; leave it out"),
    ],
)
def test_settings_of_vllm_are_not_ignored_by_the_other_engine(argument, message):
    config, arguments = composed("model=qwen_vl_tiny", argument, engine="own")
    with pytest.raises(DataError, match=re.escape(message)):
        refuse_vllm_settings(config, arguments)


def test_the_server_replaces_the_process(model, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *command: started.append(command))
    command = launched(f"ckpt={model}")
    command.run()
    assert started == [(command.arguments[0], command.arguments, command.environment)]


def test_an_engine_that_does_not_exist_is_named():
    config, _ = composed("model=qwen_vl_tiny", engine="sglang")
    with pytest.raises(ValueError, match="engine must be one of own, vllm, got 'sglang'"):
        check_values(config)
