"""Which dtypes train together, and training in float16, which the CPU can emulate."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from small_run import read
from tiny import tiny_family
from toy_task import trainer

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.training.precision import (
    GROWTH_STEPS,
    INITIAL_SCALE,
    Float16Precision,
    LossScale,
    check_precision,
)
from qwenvl_lit.types import DataError

CHOICES = {"family": tiny_family(), "adapter": None, "generation": Generation(), "metrics": {}}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(precision, dtype, device, monkeypatch, *, trains_base=False, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    strategy = SimpleNamespace(root_device=torch.device(device))
    stand_in = SimpleNamespace(strategy=strategy, precision=precision, num_devices=1, num_nodes=1)
    check_precision(stand_in, dtype, trains_base_weights=trains_base)


@pytest.mark.parametrize(
    ("precision", "dtype", "device", "trains_base"),
    [
        ("bf16-mixed", BF16, "cuda", False),
        ("bf16-mixed", BF16, "cpu", True),
        ("bf16-mixed", FP32, "cpu", True),
        ("32-true", FP32, "cpu", True),
        ("32-true", BF16, "cpu", False),
        ("16-mixed", FP16, "cuda", False),
        ("16-mixed", FP32, "cuda", True),
    ],
)
def test_choices_that_work_are_accepted(precision, dtype, device, trains_base, monkeypatch):
    check(precision, dtype, device, monkeypatch, trains_base=trains_base)


@pytest.mark.parametrize(
    ("precision", "dtype", "device", "message"),
    [
        ("bf16-mixed", FP16, "cpu", r"here use model\.dtype=bfloat16 trainer\.precision=bf16-"),
        ("bf16-mixed", FP16, "cuda", r"here use trainer\.precision=16-mixed, or "),
        ("32-true", FP16, "cpu", r"model\.dtype=float16 does not go with trainer\.precision=32-"),
        ("16-mixed", FP16, "cpu", r"16-mixed needs a CUDA GPU; .*use model\.dtype=bfloat16 "),
        ("16-mixed", BF16, "cuda", r"model\.dtype=bfloat16 does not go with it: use .*float16"),
        (
            "16-true",
            FP16,
            "cuda",
            r"must be 32-true, bf16-mixed or 16-mixed, got 16-true",
        ),
        ("bf16-mixed", torch.float64, "cpu", r"model\.dtype=float64 cannot be trained"),
    ],
)
def test_choices_that_do_not_are_a_line_that_says_what_does(
    precision, dtype, device, message, monkeypatch
):
    with pytest.raises(DataError, match=message):
        check(precision, dtype, device, monkeypatch)


def test_float16_weights_are_not_trained_themselves(monkeypatch):
    with pytest.raises(DataError, match=r"use model\.dtype=float32 with trainer\.precision=16"):
        check("16-mixed", FP16, "cuda", monkeypatch, trains_base=True)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", FP32), ("32-true", BF16)])
def test_a_gpu_without_bfloat16_is_named(precision, dtype, monkeypatch):
    with pytest.raises(DataError, match=r"V100 has no bfloat16: use model\.dtype=float16 trai"):
        check(precision, dtype, "cuda", monkeypatch, capability=(7, 0))


def train(folder, plugin, *, dtype: str, adapter) -> lightning.Trainer:
    module = VisionLanguageModule(
        family=tiny_family(dtype=dtype),
        adapter=adapter,
        generation=Generation(),
        metrics={},
        optim=AdamW(lr=1e-2, warmup=0),
    )
    data = DataModule(processor=module.processor, read=read, train="abcdefgh", batch_size=2)
    run = trainer(folder, plugins=plugin, max_steps=4, gradient_clip_val=1.0, limit_val_batches=0)
    run.fit(module, data)
    return run


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        ("float16", LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")),
        ("float32", Full()),
    ],
    ids=["lora", "full"],
)
def test_float16_trains_as_float32_does(dtype, adapter, tmp_path):
    scores = {}
    for name, plugin in (("float16", Float16Precision("cpu")), ("float32", None)):
        torch.manual_seed(0)
        used = dtype if name == "float16" else "float32"
        run = train(tmp_path, plugin, dtype=used, adapter=adapter)
        scores[name] = [run.callback_metrics[key] for key in ("train/loss", "train/grad_norm")]
    # float16 has 11 significant bits; the differences of four steps add up
    torch.testing.assert_close(scores["float16"], scores["float32"], rtol=0.02, atol=0)


def test_a_gradient_that_overflows_halves_the_scale_until_the_run_must_stop():
    scale, overflow = LossScale(), torch.tensor(False)
    halvings = int(torch.tensor(INITIAL_SCALE).log2())
    for _ in range(halvings):
        assert scale.update(overflow)
    assert scale.scale == 1
    assert not scale.update(overflow)
    assert scale.update(~overflow)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(~overflow)
    assert scale.scale == 2


def test_a_checkpoint_has_the_scale():
    stored = VisionLanguageModule(**CHOICES)
    resumed = VisionLanguageModule(**CHOICES)
    for module in (stored, resumed):
        module.loss_scale = LossScale()
    stored.loss_scale.update(torch.tensor(False))
    checkpoint = {"state_dict": {}}
    stored.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.loss_scale.scale == INITIAL_SCALE / 2
