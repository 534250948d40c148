"""Fine-tuning of a full model, on files in COCO's layout."""

import json
from pathlib import Path

import pytest
import torch
from commands import compose_config, newest_run, output_of, read_json_lines
from make_checkpoint import write_checkpoint
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from qwenvl_lit import build
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.runs.run import config_folder

SHORT_ANSWERS = "generation.max_new_tokens=4"


def write_model(folder: Path) -> None:
    """Writes a full model of random weights, of the size of `model=qwen_vl_tiny`."""
    conf = OmegaConf.load(config_folder() / "model/qwen_vl_tiny.yaml")
    config = OmegaConf.to_container(conf.config)
    family = QwenVLFamily(config=config, vocabulary="tiny", dtype="bfloat16")
    write_checkpoint(family.load(), TINY_VOCABULARY, folder)


def write_coco(folder: Path, *, count: int) -> None:
    """Writes images of val2014 with one caption each."""
    for name in ("val2014", "annotations"):
        (folder / name).mkdir(parents=True)
    images, captions = [], []
    for number in range(1, count + 1):
        name = f"COCO_val2014_{number:012}.jpg"
        width, color = 64 + number, (5 * number, 100, 255 - 5 * number)
        Image.new("RGB", (width, 48), color).save(folder / "val2014" / name)
        images.append({"id": number, "file_name": name, "width": width, "height": 48})
        caption = f"A plain of colour {number}."
        captions.append({"id": number, "image_id": number, "caption": caption})
    annotations = {"images": images, "annotations": captions}
    (folder / "annotations/captions_val2014.json").write_text(json.dumps(annotations))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model in F, COCO in G, and one trained run."""
    folder = tmp_path_factory.mktemp("home")
    write_model(folder / "F")
    write_coco(folder / "G", count=40)
    overrides = ["model=qwen_vl_chat", "model.path=F", "data=coco_en_mini", "data.root=G"]
    assert "Trained parameters" in output_of(folder, "train", *overrides)
    return folder


def predictions(home: Path, command: str) -> list[dict]:
    return read_json_lines(newest_run(home, command) / "predictions.jsonl")


def test_a_fine_tuned_model_is_scored_and_answers_a_question(home):
    trained = newest_run(home, "train")
    output_of(home, "test", f"ckpt={trained}", SHORT_ANSWERS)
    held_out = json.loads((trained / "split.json").read_text())["validation"]
    [scored] = predictions(home, "test")
    assert [scored["id"]] == list(held_out.values())
    question = ["image=G/val2014/COCO_val2014_000000000001.jpg", "prompt=Is it red?"]
    output_of(home, "predict", f"ckpt={trained}", *question, SHORT_ANSWERS)
    [answer] = predictions(home, "predict")
    assert "Is it red?" in answer["prompt"]


def test_a_run_that_started_from_a_run_can_be_scored(home):
    first = newest_run(home, "train")
    data = ["data=coco_en_mini", "data.root=G"]
    printed = output_of(
        home, "train", f"ckpt={first}", "adapter=lora_all", *data, "trainer.max_steps=1"
    )
    second = newest_run(home, "train")
    # Its adapter belongs to merged weights that no folder holds: elsewhere it would be wrong.
    assert not list(second.glob("checkpoints/*_adapter"))
    assert "in peft's format" not in printed
    stored = torch.load(second / "checkpoints/last.ckpt", weights_only=True)
    assert stored["config"]["init"]["checkpoint"] == str(first / "checkpoints/best.ckpt")
    assert stored["config"]["model"]["path"] == "F"
    output_of(home, "test", f"ckpt={second}", SHORT_ANSWERS)
    [scored] = predictions(home, "test")
    assert scored["id"]


def train_config(*arguments: str) -> DictConfig:
    """The config of `train` with these arguments, among them `ckpt=`."""
    line = prepare("train", arguments, run="start")
    offer_groups(line)
    return compose_config("train", *line.arguments)


@pytest.fixture
def in_home(home, monkeypatch) -> str:
    """Makes `home` the current folder; returns the argument that names its newest run."""
    monkeypatch.chdir(home)
    return f"ckpt={newest_run(home, 'train')}"


def test_training_from_a_run_uses_its_model_and_recipe(in_home):
    config = train_config(in_home)
    assert (config.model.path, config.optim.lr) == ("F", 1e-4)
    assert (config.trainer.rows_per_step, config.trainer.strategy) == (16, "auto")
    assert config.data.train == ["train_single.jsonl#5120", "train.jsonl#17920"]


def test_another_adapter_than_the_run_has_brings_its_own_learning_rate(in_home):
    config = train_config(in_home, "adapter=full")
    assert (config.model.path, config.optim.lr) == ("F", 1e-5)
    assert config.trainer.rows_per_step == 16


def test_presets_and_the_command_line_override_the_recipe_of_a_run(in_home):
    overrides = ["experiment=official_lora", "optim.lr=3e-5", "strategy=ddp_cpu"]
    config = train_config(in_home, *overrides)
    assert (config.adapter.rank, config.optim.lr) == (64, 3e-5)
    assert (config.model.path, config.model.supervise) == ("F", "official")
    assert config.init.checkpoint.endswith("checkpoints/best.ckpt")
    assert config.trainer.strategy._target_.endswith("DDPStrategy")


def test_without_a_run_training_starts_from_the_model():
    assert train_config("model=qwen_vl_chat").init == {}
    assert build.module(train_config("generation=short")).init is None
