"""The published model's layout and COCO's, as a person has them: fine-tune, go on from what was learned, score, ask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from make_checkpoint import write_checkpoint
from omegaconf import OmegaConf
from PIL import Image

from qwenvl_lit import build
from qwenvl_lit.cli.command import offer_groups, prepare
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY
from qwenvl_lit.runs.run import config_folder


def small_checkpoint(folder: Path) -> Path:
    """Random weights in the published layout."""
    sizes = OmegaConf.to_container(
        OmegaConf.load(config_folder() / "model/qwen_vl_tiny.yaml").config
    )
    write_checkpoint(
        QwenVLFamily(config=sizes, vocabulary="tiny", dtype="bfloat16").load(),
        TINY_VOCABULARY,
        folder,
    )
    return folder


def coco(folder: Path, count: int) -> Path:
    """Images of val2014 with a caption each."""
    names = [f"COCO_val2014_{number:012}.jpg" for number in range(1, count + 1)]
    for place in ("val2014", "annotations"):
        (folder / place).mkdir(parents=True)
    for number, name in enumerate(names, 1):
        Image.new("RGB", (64 + number, 48), (5 * number, 100, 255 - 5 * number)).save(
            folder / "val2014" / name
        )
    images = [
        {"id": number, "file_name": name, "width": 64 + number, "height": 48}
        for number, name in enumerate(names, 1)
    ]
    captions = [
        {"id": image["id"], "image_id": image["id"], "caption": f"A plain of colour {image['id']}."}
        for image in images
    ]
    (folder / "annotations/captions_val2014.json").write_text(
        json.dumps({"images": images, "annotations": captions})
    )
    return folder


def run(folder: Path, verb: str, *arguments: str) -> str:
    environment = {**os.environ, "QWENVL_LIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", f"qwenvl_lit.{verb}", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{verb} {arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def newest(folder: Path, verb: str) -> Path:
    return max((folder / "outputs" / verb).iterdir(), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model in F, images in G, and one run."""
    folder = tmp_path_factory.mktemp("home")
    small_checkpoint(folder / "F")
    coco(folder / "G", count=40)
    printed = run(
        folder, "train", "model=qwen_vl_chat", "data=coco_en_mini", "model.path=F", "data.root=G"
    )
    assert "Trained parameters" in printed
    return folder


def test_fine_tuning_scoring_and_asking(home):
    trained = newest(home, "train")
    run(home, "test", f"ckpt={trained}", "generation.max_new_tokens=4")
    held_out = json.loads((trained / "split.json").read_text())["validation"]
    [scored] = [
        json.loads(line)
        for line in (newest(home, "test") / "predictions.jsonl").read_text().splitlines()
    ]
    assert [scored["id"]] == list(held_out.values())
    question = [
        "image=G/val2014/COCO_val2014_000000000001.jpg",
        "prompt=Is it red?",
        "generation.max_new_tokens=4",
    ]
    run(home, "predict", f"ckpt={trained}", *question)
    [answer] = (newest(home, "predict") / "predictions.jsonl").read_text().splitlines()
    assert "Is it red?" in json.loads(answer)["prompt"]


def test_a_run_on_top_of_a_run_rebuilds_itself(home):
    first = newest(home, "train")
    run(
        home,
        "train",
        f"ckpt={first}",
        "adapter=lora_all",
        "data=coco_en_mini",
        "data.root=G",
        "trainer.max_steps=1",
    )
    second = newest(home, "train")
    stored = torch.load(second / "checkpoints/last.ckpt", weights_only=True)
    assert stored["config"]["init"]["checkpoint"] == str(first / "checkpoints/last.ckpt")
    assert stored["config"]["model"]["path"] == "F"
    run(home, "test", f"ckpt={second}", "generation.max_new_tokens=4")
    [scored] = (newest(home, "test") / "predictions.jsonl").read_text().splitlines()
    assert json.loads(scored)["id"]


def composed(monkeypatch, *arguments: str):
    """The config of `train` with these arguments."""
    line = prepare("train", arguments, run="start")
    offer_groups(line)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", line.arguments)


def test_a_run_is_a_model_with_a_recipe_and_the_command_line_and_presets_win(monkeypatch, home):
    ckpt = f"ckpt={newest(home, 'train')}"
    monkeypatch.chdir(home)
    config = composed(monkeypatch, ckpt)
    assert (config.model.path, config.optim.lr, config.trainer.accumulate_grad_batches) == (
        "F",
        1e-4,
        16,
    )
    assert (config.trainer.strategy, config.data.train) == (
        "auto",
        ["train_single.jsonl#5120", "train.jsonl#17920"],
    )
    config = composed(monkeypatch, ckpt, "adapter=full")
    assert (config.model.path, config.optim.lr, config.trainer.accumulate_grad_batches) == (
        "F",
        1e-5,
        16,
    ), "a rate for what is trained"
    config = composed(
        monkeypatch, ckpt, "experiment=official_lora", "optim.lr=3e-5", "strategy=ddp_cpu"
    )
    assert (config.adapter.rank, config.optim.lr, config.model.path, config.model.supervise) == (
        64,
        3e-5,
        "F",
        "official",
    )
    assert config.init.checkpoint.endswith("checkpoints/last.ckpt")
    assert config.trainer.strategy._target_.endswith("DDPStrategy")


def test_without_a_run_training_starts_from_the_model(monkeypatch):
    config = composed(monkeypatch, "model=qwen_vl_chat")
    assert config.init == {}
    assert build.module(composed(monkeypatch, "generation=short")).init is None
