"""A model of the demo, trained for a minute, with rows, adapters and our own answers.

`VLLM_TEST_RUN=FOLDER make test-vllm` takes a run folder of the demo instead of training one.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from qwenvl_lit import QwenVL
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import Conversation

ROWS = 600
TRAIN = ["data.train=[train_single.jsonl#2560,train.jsonl#5120]", "data.num_workers=0"]
LAYERS = r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.(w1|w2|c_proj))"
SIZES_OF_CHANGES = {"first": 0.05, "second": 0.08}  # standard deviations of the adapters' tensors


@dataclass(frozen=True)
class Demo:
    """A run of the demo.

    Attributes:
        folder: its export, a full model in float32.
        rows: rows of the test set.
    """

    run: Path
    folder: Path
    rows: list[Conversation]

    def load(self, source: Path | None = None, **options) -> QwenVL:
        options = {"device": "cpu", "dtype": "float32", **options}
        return QwenVL.load(source or self.folder, **options)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    home = tmp_path_factory.mktemp("demo")
    given = os.environ.get("VLLM_TEST_RUN")
    usual = Path.home() / ".cache/qwenvl_lit" if given else home / "cache"
    cache = Path(os.environ.setdefault("QWENVL_LIT_CACHE", str(usual)))
    run = Path(given or home / "run")
    command = partial(subprocess.run, check=True, cwd=home)
    package = [sys.executable, "-m"]
    if not run.exists():
        command([*package, "qwenvl_lit.train", f"hydra.run.dir={run}", *TRAIN])
    folder = home / "exported"
    arguments = [f"ckpt={run}", f"out={folder}", "dtype=float32", "compare=none"]
    command([*package, "qwenvl_lit.export", *arguments])
    options = ReadOptions(root=cache / "demo")
    rows = list(islice(read_rows(str(cache / "demo/test.jsonl"), options), ROWS))
    return Demo(run=run, folder=folder, rows=rows)


@pytest.fixture(scope="session")
def answers(demo) -> list[str]:
    """The answers of our own engine to the rows."""
    return [str(answer) for answer in demo.load().generate(demo.rows, batch_size=32)]


@pytest.fixture(scope="session")
def adapters(demo, tmp_path_factory) -> dict[str, Path]:
    """Folders of random adapters on all layers of the language model, as peft writes them."""
    from peft import LoraConfig, get_peft_model

    folders = {}
    for seed, (name, deviation) in enumerate(SIZES_OF_CHANGES.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS)
        model = get_peft_model(demo.load().model, config)
        for tensor_name, tensor in model.named_parameters():
            if "lora_B" in tensor_name:
                torch.nn.init.normal_(tensor, std=deviation)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
        # As in the folders that `export` writes: which prompts the adapter was trained on.
        settings = json.loads((demo.folder / "qwenvl_lit.json").read_text())
        kept = {group: settings[group] for group in ("model", "generation")}
        (folders[name] / "qwenvl_lit.json").write_text(json.dumps(kept))
    return folders
