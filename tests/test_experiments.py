"""Every preset of conf/experiment trains a small model for one step."""

import re
from pathlib import Path

import pytest
import torch
from commands import compose_config
from hydra.utils import instantiate
from make_checkpoint import write_checkpoint
from omegaconf import DictConfig, OmegaConf
from small_demo import SIZES
from tiny import tiny_family

from qwenvl_lit import build
from qwenvl_lit.data.demo.dataset import write_demo
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.runs.run import config_folder

PRESETS = sorted(file.stem for file in (config_folder() / "experiment").glob("*.yaml"))
ONE_STEP_ON_CPU = [
    "strategy=cpu",
    "data.num_workers=0",
    "data.validation=2",
    "trainer.max_steps=1",
    "trainer.limit_val_batches=0",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_checkpointing=false",
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders with full models, by the beginning of the names of their files in conf/model."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(tiny_family(dtype="bfloat16").load(), TINY_VOCABULARY, folder / "qwen_vl")
    for name in ("qwen2_5_vl", "qwen3_vl"):
        family = instantiate(compose_config("train", f"model={name}_tiny").model, _convert_="all")
        (folder / name).mkdir()
        family.export(family.base_reader(), folder / name, dtype=torch.bfloat16)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo dataset with 24 images of one object."""
    return write_demo(tmp_path_factory.mktemp("data") / "demo", **{**SIZES, "single": 24})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_a_step(preset, checkpoints, demo, tmp_path):
    data = ["data=jsonl", "data.train=train_single.jsonl"]
    kind = preset.partition("_vl_")[0] + "_vl" if "_vl_" in preset else "qwen_vl"
    train_a_step([f"experiment={preset}", *data], checkpoints[kind], demo, tmp_path)


def test_the_experiment_of_the_documentation_trains_a_step(checkpoints, demo, tmp_path):
    """Its file has the settings that the page explains, and trains on two files."""
    page = (config_folder().parent / "docs/fine_tuning.md").read_text(encoding="utf-8")
    [text] = re.findall(r"^```yaml\n(# @package _global_\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    folder = tmp_path / "my_conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment/signs.yaml").write_text(text)
    for name in ("signs", "cars"):
        (demo / f"{name}.jsonl").write_bytes((demo / "train_single.jsonl").read_bytes())
    overrides = [f"hydra.searchpath=[file://{folder}]", "experiment=signs"]
    config = train_a_step(overrides, checkpoints["qwen_vl"], demo, tmp_path)
    assert (config.adapter.targets, config.adapter.rank) == ("all-linear", 16)
    assert (config.optim.lr, config.trainer.max_epochs) == (5e-5, 3)
    assert list(config.metrics) == ["exact_match"]


def train_a_step(overrides: list[str], checkpoint: Path, demo: Path, tmp_path: Path) -> DictConfig:
    """Trains the small model for a step with the composed settings, which are returned."""
    paths = [f"data.root={demo}", f"paths.run={tmp_path}"]
    config = compose_config("train", *overrides, *paths, *ONE_STEP_ON_CPU)
    # The test has neither the published weights, nor bitsandbytes, nor the datasets of a mixture.
    if config.model.path:
        config.model.path = str(checkpoint)
    if "quantization" in config.adapter:
        config.adapter.quantization = None
    config.data = {key: config.data[key] for key in config.data if key != "datasets"}
    build.start(config)
    module = build.module(config)
    trainer = build.trainer(config, callbacks={})
    trainer.fit(module, build.data(config, module.processor))
    assert trainer.global_step == 1
    assert trainer.callback_metrics["train/grad_norm"] > 0
    trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
    assert all(torch.isfinite(tensor).all() for tensor in trained)
    return config


def test_a_preset_names_its_command_and_has_overrides_only():
    for preset in PRESETS:
        file = config_folder() / "experiment" / f"{preset}.yaml"
        assert f"python -m qwenvl_lit.train experiment={preset}" in file.read_text()
        assert "_target_" not in OmegaConf.to_yaml(OmegaConf.load(file))


def test_the_settings_of_ms_swift():
    lora = compose_config("train", "experiment=swift_lora")
    full = compose_config("train", "experiment=swift_full")
    for config in (lora, full):
        assert (config.model.path, config.model.max_length) == ("Qwen/Qwen-VL-Chat", 2048)
        assert config.data.train == "annotations/captions_val2014.json"
        assert (config.data.validation, config.seed) == (0.01, 42)
        assert (config.data.batch_size, config.data.rows_per_step) == ("auto", 16)
        assert (config.optim.betas, config.optim.eps) == ([0.9, 0.95], 1e-8)
        assert (config.optim.weight_decay, config.optim.warmup) == (0.1, 0.05)
        assert config.optim.schedule == "cosine"
        assert (config.trainer.gradient_clip_val, config.trainer.max_epochs) == (1.0, 1)
    assert (lora.optim.lr, full.optim.lr) == (1e-4, 1e-5)
    assert (lora.trainer.validate_every, full.trainer.validate_every) == (50, 200)
    assert (lora.adapter.rank, lora.adapter.alpha, lora.adapter.dropout) == (8, 32, 0.05)
    assert full.adapter._target_ == "qwenvl_lit.training.adapters.methods.Full"
    assert full.adapter.freeze == []
    assert full.trainer.strategy._target_ == "qwenvl_lit.training.strategies.FSDP2Strategy"


def test_the_settings_of_the_official_scripts():
    lora = compose_config("train", "experiment=official_lora")
    full = compose_config("train", "experiment=official_full")
    for config in (lora, full):
        assert (config.optim.lr, config.optim.betas) == (1e-5, [0.9, 0.95])
        assert config.optim.warmup == 0.01
        assert (config.model.supervise, config.model.max_length) == ("official", 2048)
    assert (lora.adapter.rank, lora.adapter.alpha, lora.adapter.dropout) == (64, 16, 0.05)
    assert (full.adapter.freeze, full.adapter.train) == (["vision"], ["resampler"])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_settings_of_the_official_code_for_the_successors(name):
    config = compose_config("train", f"experiment={name}_official_lora")
    assert config.model.path.startswith("Qwen/Qwen2.5" if name == "qwen2_5_vl" else "Qwen/Qwen3")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (64, 128, 0.05)
    assert config.adapter.targets == "attention"
    assert (config.optim.lr, config.optim.warmup, config.optim.schedule) == (1e-5, 0.03, "cosine")
    assert (config.optim.betas, config.optim.weight_decay) == ([0.9, 0.999], 0)
    assert (config.trainer.rows_per_step, config.trainer.gradient_clip_val) == (16, 1.0)
    assert (config.model.min_pixels, config.model.max_pixels) == (16 * 28 * 28, 576 * 28 * 28)
    assert (config.model.supervise, config.model.max_length) == ("official", 8192)


def test_the_settings_of_ms_swift_for_the_successors():
    config = compose_config("train", "experiment=qwen3_vl_swift_lora")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (8, 32, 0.05)
    assert (config.adapter.targets, config.optim.lr, config.optim.warmup) == (
        "language",
        1e-4,
        0.05,
    )
    assert (config.model.max_length, config.model.supervise) == (2048, "answers")
    assert (config.data.validation, config.trainer.rows_per_step) == (0.01, 16)
    other = compose_config("train", "experiment=qwen3_vl_swift_lora", "model=qwen2_5_vl_3b")
    assert (other.model.path, other.adapter.targets) == ("Qwen/Qwen2.5-VL-3B-Instruct", "language")
