"""A flipped bit in weights ends each command with one line, unless `verify=false` is given."""

import json
import shutil

import pytest
import torch
from commands import output_of, run_command
from PIL import Image
from scripted import tiny_checkpoint

from qwenvl_lit import QwenVL, checksums
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.types import DataError

TRAIN = ["data=jsonl", "data.train=rows.jsonl", "data.validation=rows.jsonl", "strategy=cpu"]
TRAIN += ["model=qwen_vl_chat", "model.path=export", "model.dtype=float32", "logger=none"]
TRAIN += ["trainer.max_steps=1", "trainer.rows_per_step=1", "hydra.run.dir=run"]
TRAIN += ["trainer.precision=32-true", "adapter.rank=2", "generation.max_new_tokens=2"]
TRAIN += ["data.num_workers=0"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a full model in `export` and a run that trained an adapter on it in `run`."""
    home = tmp_path_factory.mktemp("home")
    tiny_checkpoint(home / "export")
    checksums.write_sums(home / "export")
    Image.new("RGB", (9, 9), "teal").save(home / "a.png")
    row = {"query": "<img>a.png</img>What?", "response": "teal"}
    (home / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    output_of(home, "train", *TRAIN)
    return home


@pytest.fixture
def home(sound, tmp_path, monkeypatch):
    shutil.copytree(sound, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def flip(file):
    """Flips one bit in the middle of a file, which is in its tensors."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shard_of(folder):
    return max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)


def test_the_adapter_of_a_run_names_its_base_model(sound, home):
    shutil.copytree("run/checkpoints/best_adapter", "copied")
    config = json.loads((home / "copied/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(sound / "export")
    assert not (home / "copied/README.md").exists()
    QwenVL.load("copied", device="cpu")


DAMAGED = {  # the file, and what names it
    "run": ("run/checkpoints/best.ckpt", "run"),
    "adapter": (
        "run/checkpoints/last_adapter/adapter_model.safetensors",
        "run/checkpoints/last_adapter",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_weights_of_a_run_are_not_loaded(kind, home):
    file, source = DAMAGED[kind]
    QwenVL.load(source, device="cpu")
    flip(home / file)
    with pytest.raises(DataError, match=rf"{file} is damaged: .*verify=false"):
        QwenVL.load(source, device="cpu")
    with pytest.raises(DataError, match=rf"{file} is damaged"):
        prepare("test", [f"ckpt={source}"], run="needed")
    prepare("test", [f"ckpt={source}", "verify=false"], run="needed")
    QwenVL.load(source, device="cpu", verify=False)


def test_a_damaged_model_is_not_loaded(home):
    flip(shard_of(home / "export"))
    for source in ("export", "run"):
        with pytest.raises(DataError, match=r"safetensors is damaged: .*SHA256SUMS.*verify=false"):
            QwenVL.load(source, device="cpu")
        QwenVL.load(source, device="cpu", verify=False)


def test_a_damaged_checkpoint_is_not_resumed(home):
    flip(home / "run/checkpoints/last.ckpt")
    process = run_command(home, "train", "resume=run", "trainer.max_steps=2")
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    [line] = [line for line in process.stderr.splitlines() if "is damaged" in line]
    assert "run/checkpoints/last.ckpt is damaged: its sha256 is" in line
    output_of(home, "train", "resume=run", "trainer.max_steps=2", "verify=false")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    checksums.verify(home / "run/checkpoints/last.ckpt")


def test_an_export_carries_checksums(home):
    output_of(home, "export", "ckpt=run", "out=merged", "compare=none")
    QwenVL.load("merged", device="cpu")
    flip(shard_of(home / "merged"))
    with pytest.raises(DataError, match="is damaged"):
        QwenVL.load("merged", device="cpu")
