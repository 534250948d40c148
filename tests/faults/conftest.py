"""A home with one of everything that commands write, for damage."""

import shutil
from pathlib import Path

import pytest
from faults.processes import fork_command
from faults.recipes import LORA, SHORTER, TRAIN, published_model

MODEL = ["model=qwen_vl_chat", "model.path=model", "model.dtype=float32", "optim=demo"]
DATA = ["data=jsonl", "data.train=rows.jsonl", "data.validation=4", "metrics=exact"]
DATA += ["data.batch_size=4", "data.num_workers=0", "generation=short"]


@pytest.fixture(scope="session")
def everything(tmp_path_factory) -> Path:
    """A published `model`; `run`, `lora`; `exported`, `adapter`; `answers`; `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("everything")
    published_model(folder)
    lines = [
        ["train", *TRAIN, *SHORTER, "hydra.run.dir=first"],
        ["train", *DATA, "trainer=smoke", "callbacks.checkpoint.every=1", "hydra.run.dir=run"],
        ["train", *DATA, *MODEL, "trainer=smoke", *LORA, "hydra.run.dir=lora"],
        ["export", "ckpt=run", "out=exported"],
        ["export", "ckpt=lora", "out=adapter", "merge=false"],
        ["predict", "ckpt=run", "hydra.run.dir=answers"],
    ]
    for line in lines:
        finished = fork_command(folder, *line)
        assert finished.status == 0, f"{line}: {finished.output}"
        if "hydra.run.dir=first" in line:
            shutil.copytree(folder / "cache/demo/images", folder / "images")
            shutil.copyfile(folder / "cache/demo/train.jsonl", folder / "rows.jsonl")
    return folder
