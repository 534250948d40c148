"""Which optimizer training has that starts from a run. Nothing is trained."""

import json
from pathlib import Path

import pytest
import torch
from commands import compose_config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from safetensors.torch import save_file

from qwenvl_lit import QwenVL
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.types import DataError


@pytest.fixture
def tiny_run(tmp_path, monkeypatch) -> Path:
    """The folder of a run of `train adapter=lora optim.lr=5e-3`, whose model chose optim=demo."""
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "tiny", "adapter=lora", "optim.lr=5e-3")


def write_run(folder: Path, *arguments: str) -> Path:
    """Writes what a run leaves before it trains, and an empty checkpoint."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        composed = compose("train", list(arguments), return_hydra_config=True)
    choices = OmegaConf.to_container(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed.hydra
    for name in (".hydra", "checkpoints"):
        (folder / name).mkdir(parents=True)
    OmegaConf.save(composed, folder / ".hydra/config.yaml")
    stored = {"hydra": {"runtime": {"choices": choices}}}
    OmegaConf.save(OmegaConf.create(stored), folder / ".hydra/hydra.yaml")
    torch.save({"state_dict": {}}, folder / "checkpoints/last.ckpt")
    return folder


def composed_lr(*arguments: str) -> float:
    line = prepare("train", arguments, run="start")
    offer_groups(line)
    return compose_config("train", *line.arguments).optim.lr


@pytest.mark.parametrize(
    ("arguments", "learning_rate", "reason"),
    [
        ([], 5e-3, "the optimizer is that of the run (optim.lr=0.005)"),
        (["adapter=lora"], 5e-3, "the optimizer is that of the run (optim.lr=0.005)"),
        (["optim.lr=1e-4"], 1e-4, "the optimizer is that of the run"),
        (
            ["adapter=full"],
            2e-3,
            "the run has another adapter, so the optimizer is optim=demo (optim.lr=0.002), as for "
            "model=qwen_vl_tiny adapter=full; to keep that of the run (optim.lr=0.005): optim=run",
        ),
        (["adapter=full", "optim=run"], 5e-3, None),
        (["adapter=full", "optim=official"], 1e-5, None),
    ],
)
def test_the_optimizer_of_a_start_is_that_of_its_model_and_adapter(
    tiny_run, arguments, learning_rate, reason
):
    line = prepare("train", ["ckpt=tiny", *arguments], run="start")
    assert line.notes == ([f"tiny: {reason}"] if reason else [])
    assert composed_lr("ckpt=tiny", *arguments) == learning_rate


def write_adapter(folder: Path, base: str | None) -> Path:
    """Writes an adapter folder as peft does."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_attn"]}
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensor = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(2, 4)}
    save_file(tensor, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the optimizer is that of the recipe of qwen_vl_chat (optim.lr=0.0001)"),
        (
            ["adapter=full"],
            "the folder has another adapter, so the optimizer is optim=swift_full "
            "(optim.lr=1e-05), as for adapter=full; to keep that of the recipe of "
            "qwen_vl_chat (optim.lr=0.0001): optim=run",
        ),
    ],
)
def test_a_start_from_an_adapter_of_others_names_the_recipe(tmp_path, arguments, reason):
    their = write_adapter(tmp_path / "their", "Qwen/Qwen-VL-Chat")
    line = prepare("train", [f"ckpt={their}", *arguments], run="start")
    assert line.notes == [f"{their} is an adapter for Qwen/Qwen-VL-Chat", f"{their}: {reason}"]


def test_an_adapter_without_the_name_of_its_base_model_asks_for_it(tmp_path):
    their = write_adapter(tmp_path / "their", None)
    message = r"adapter_config\.json names no base model: give model\.path=FOLDER"
    for command, run in (("train", "start"), ("predict", "needed")):
        with pytest.raises(DataError, match=message):
            prepare(command, [f"ckpt={their}"], run=run)
        prepare(command, [f"ckpt={their}", "model.path=F"], run=run)
    with pytest.raises(DataError, match=message):
        QwenVL.load(their)


def test_a_start_from_a_start_knows_the_model(tiny_run):
    second = prepare("train", ["ckpt=tiny"], run="start")
    offer_groups(second)
    write_run(tiny_run.with_name("second"), *second.arguments)
    assert composed_lr("ckpt=second", "adapter=full") == 2e-3
