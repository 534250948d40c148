"""Every preset of conf/experiment does an optimizer step with a small model."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from make_checkpoint import write_checkpoint
from omegaconf import OmegaConf

from qwenvl_lit import build
from qwenvl_lit.cli.command import config_folder
from qwenvl_lit.data.demo.dataset import write_demo
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY

PRESETS = sorted(file.stem for file in (config_folder() / "experiment").glob("*.yaml"))
VISUAL = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "n_queries": 4,
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
}
# what a preset needs that a test does not have: its cards, its extra package, its images
HERE = ["strategy=cpu", "data.num_workers=0", "data.validation=2"]
HERE += [
    "trainer.max_steps=1",
    "trainer.limit_val_batches=0",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_checkpointing=false",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder in the published layout."""
    folder = tmp_path_factory.mktemp("models") / "small"
    family = QwenVLFamily(
        config={**SIZES, "visual": {**VISUAL, "resampler_heads": 2}},
        vocabulary="tiny",
        dtype="bfloat16",
    )
    write_checkpoint(family.load(), TINY_VOCABULARY, folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    sizes = {
        "train": 24,
        "single": 24,
        "validation": 2,
        "test": 2,
        "unseen_pairs": 2,
        "new_classes": 16,
    }
    return write_demo(tmp_path_factory.mktemp("data") / "demo", **sizes)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_does_a_step(preset, model, rows, tmp_path):
    data = ["data=jsonl", f"data.root={rows}", "data.train=train_single.jsonl"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [f"experiment={preset}", f"paths.run={tmp_path}", *data, *HERE])
    if config.model.path:
        config.model.path = str(model)
    if "quantization" in config.adapter:
        config.adapter.quantization = None
    config.data = {
        key: value for key, value in config.data.items() if key != "datasets"
    }  # each of them has its own tests
    build.start(config)
    task = build.module(config)
    trainer = build.trainer(config, callbacks={})
    trainer.fit(task, build.data(config, task.processor))
    assert trainer.global_step == 1
    assert trainer.callback_metrics["train/grad_norm"] > 0
    changed = [tensor for tensor in task.parameters() if tensor.requires_grad]
    assert all(torch.isfinite(tensor).all() for tensor in changed)


def test_a_preset_says_how_to_run_it_and_holds_overrides_only():
    for preset in PRESETS:
        file = config_folder() / "experiment" / f"{preset}.yaml"
        assert f"python -m qwenvl_lit.train experiment={preset}" in file.read_text()
        assert "_target_" not in OmegaConf.to_yaml(OmegaConf.load(file))


def preset(name: str):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", [f"experiment={name}"])


def test_the_settings_of_ms_swift():
    lora, full = preset("swift_lora"), preset("swift_full")
    for config in (lora, full):
        assert config.model.path == "Qwen/Qwen-VL-Chat"
        assert config.data.train == "annotations/captions_val2014.json"
        assert (
            config.data.batch_size,
            config.trainer.accumulate_grad_batches,
            config.data.validation,
            config.seed,
        ) == (1, 16, 0.01, 42)
        assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == (
            [0.9, 0.95],
            1e-8,
            0.1,
        )
        assert (config.optim.warmup, config.optim.schedule) == (0.05, "cosine")
        assert (
            config.trainer.gradient_clip_val,
            config.trainer.max_epochs,
            config.model.max_length,
        ) == (1.0, 1, 2048)
    assert (lora.optim.lr, full.optim.lr) == (1e-4, 1e-5)
    assert (lora.trainer.val_check_interval, full.trainer.val_check_interval) == (16 * 50, 16 * 200)
    assert (lora.adapter.rank, lora.adapter.alpha, lora.adapter.dropout) == (8, 32, 0.05)
    assert (full.adapter._target_, full.adapter.freeze) == ("qwenvl_lit.training.adapters.methods.Full", [])
    assert full.trainer.strategy._target_ == "qwenvl_lit.training.strategies.FSDP2Strategy"


def test_the_settings_of_the_official_scripts():
    lora, full = preset("official_lora"), preset("official_full")
    for config in (lora, full):
        assert (config.optim.lr, config.optim.betas, config.optim.warmup) == (
            1e-5,
            [0.9, 0.95],
            0.01,
        )
        assert (config.model.supervise, config.model.max_length) == ("official", 2048)
    assert (lora.adapter.rank, lora.adapter.alpha, lora.adapter.dropout) == (64, 16, 0.05)
    assert (full.adapter.freeze, full.adapter.train) == (["vision"], ["resampler"])
