"""What is done to a model before it trains changes neither what it computes nor what is trained."""

import logging
from collections import Counter

import lightning
import pytest
import torch
from small_network import CLOSE, IMAGE, image_positions, images, small_network, text
from small_run import family, read
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from toy_task import trainer

from qwenvl_lit.callbacks.run_log import RunLog
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.training.speed import (
    Speed,
    blocks_of,
    compile_blocks,
    recompute_blocks,
    replay_tower,
)

LORA = LoRA(rank=2, alpha=4, dropout=0.0, targets=r"transformer\.h\.\d+\.attn\.c_attn")
EVERYWHERE = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")


def adapted(adapter) -> nn.Module:
    torch.manual_seed(0)
    model = adapter.apply(small_network(), QwenVLFamily.components).train()
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1)
    return model


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([IMAGE + text(length, seed=row) for row in range(rows)])
    positions = image_positions(ids.tolist())
    return {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": images(rows),
        "vision_positions": positions,
    }


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.fixture
def fast_compiler(monkeypatch):
    """Graphs are captured and differentiated as ever, and run as they are: kernels would take minutes to be written."""
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="aot_eager"))
    counters.clear()


@pytest.mark.parametrize("adapter", [Full(), LORA, EVERYWHERE], ids=["full", "lora", "lora_all"])
def test_compiled_blocks_compute_what_they_are(adapter, fast_compiler):
    model = adapted(adapter)
    expected = gradients(model, batch(2, 7))
    compile_blocks(model)
    found = gradients(model, batch(2, 7))
    assert counters["stats"]["unique_graphs"] == 2  # the tower's block, and the language model's
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE)


def test_sizes_that_change_are_compiled_for_once_more(fast_compiler):
    model = adapted(LORA)
    compile_blocks(model)
    for rows, length in ((2, 7), (3, 9), (4, 5), (2, 11), (5, 20), (3, 3)):
        gradients(model, batch(rows, length))
    assert counters["stats"]["unique_graphs"] == 4
    with torch.no_grad():
        for rows in (2, 3, 4):
            model(**batch(rows, 6))
    assert counters["stats"]["unique_graphs"] <= 6


def test_compiled_blocks_run_again_for_their_gradients(fast_compiler):
    model = adapted(LORA)
    expected = gradients(model, batch(2, 7))
    recompute_blocks(model)
    compile_blocks(model)
    for name, gradient in gradients(model, batch(2, 7)).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_what_runs_again_in_compiled_blocks_is_not_kept_and_has_the_same_dropout(device):
    """Gradients against differences of the loss, with kernels that the compiler writes."""
    torch._dynamo.reset()
    model = adapted(LoRA(rank=2, alpha=4, dropout=0.5, targets=LORA.targets)).to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch(2, 7).items()}
    weight = next(tensor for name, tensor in model.named_parameters() if "lora_B" in name)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        torch.manual_seed(7)
        found = model(**inputs).loss
        with torch.no_grad():
            weight.sub_(direction, alpha=step)
        return found

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(tensor.nbytes), tensor)[1], lambda tensor: tensor
        ):
            loss(0.0)
        return sum(sizes)

    torch.manual_seed(7)
    compile_blocks(model)
    usual = kept()
    for block in blocks_of(model).values():
        del block.compute
    recompute_blocks(model)
    compile_blocks(model)
    assert kept() < 0.8 * usual  # weights are counted, too
    torch.manual_seed(7)
    model(**inputs).loss.backward()
    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    rtol = (
        0.02 if device == "cpu" else 0.05
    )  # 0.022 off on an H100; gradients of another dropout are 0.6 off and more
    torch.testing.assert_close(
        (weight.grad * direction).sum(), slope.detach(), rtol=rtol, atol=1e-3
    )


def test_a_block_that_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    def refused(function):
        def compiled(*args, **kwargs):
            raise Unsupported("a layer of another package")

        return compiled

    model = adapted(LORA)
    expected = gradients(model, batch(2, 7))
    monkeypatch.setattr(torch, "compile", refused)
    compile_blocks(model)
    with caplog.at_level(logging.WARNING):
        found = gradients(model, batch(2, 7))
    assert "a layer of another package" in caplog.text
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


@pytest.mark.parametrize("adapter", [Full(), LORA], ids=["full", "lora"])
def test_every_block_or_some_run_again_and_embeddings_get_no_gradient_for_it(adapter):
    model = adapted(adapter)
    runs = Counter()
    for path, block in blocks_of(model).items():
        block.ln_1.register_forward_pre_hook(lambda norm, args, path=path: runs.update([path]))
    recompute_blocks(model, list(blocks_of(model))[:1])
    gradients(model, batch(1, 5))
    first, *others = blocks_of(model)
    assert runs[first] == 2
    assert {runs[path] for path in others} == {1}
    recompute_blocks(model)
    assert all(block.gradient_checkpointing for block in blocks_of(model).values())
    assert model.get_input_embeddings()(torch.tensor([[1]])).requires_grad == isinstance(
        adapter, Full
    )


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"compile": "always"}, "speed.compile is auto, true, false, got 'always'"),
        ({"checkpointing": True}, "speed.checkpointing is auto, none, full, got True"),
        ({"float8": "yes"}, "speed.float8 is true, false, got 'yes'"),
    ],
)
def test_other_choices_are_refused(choices, says):
    with pytest.raises(ValueError, match=says):
        Speed(**choices)


class Watch(lightning.Callback):
    """Makes every wait of the host for the device an error, from the fifth batch to the end of the twelfth, loading included."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode(
            {3: "error", 11: "default"}.get(batch_idx, torch.cuda.get_sync_debug_mode())
        )


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
def test_no_step_waits_for_the_device(tmp_path, packing):
    task = VisionLanguageModule(
        family=family(),
        adapter=LoRA(rank=2, alpha=4, dropout=0.1, targets="all-linear"),
        generation=Generation(),
        metrics={},
        optim=AdamW(lr=1e-2),
        speed=Speed(checkpointing="full"),
    )
    sizes = {"max_tokens": 128, "packing": True} if packing else {"batch_size": 2}
    data = DataModule(
        processor=task.processor,
        read=read,
        train="abcdefghijklmnopqrstuvwxyz" * 2,
        num_workers=1,
        **sizes,
    )
    options = {
        "accelerator": "gpu",
        "precision": "bf16-mixed",
        "log_every_n_steps": 1000,
        "max_steps": 8,
    }
    made = trainer(
        tmp_path,
        Throughput(),
        RunLog(),
        Watch(),
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        max_epochs=-1,
        **options,
    )
    try:
        made.fit(task, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.global_step == 8


@pytest.mark.gpu
def test_a_recorded_tower_sees_what_the_tower_sees():
    tower = small_network().cuda().transformer.visual
    alone = tower.forward
    replay_tower(tower)
    for number, count in enumerate((1, 2, 1, 2, 1, 2, 7, 1)):
        given = images(count, seed=number).cuda()
        with torch.inference_mode() if number == 4 else torch.no_grad():
            torch.testing.assert_close(tower(given), alone(given), **CLOSE)
    assert {kind[0][0] for kind in tower.forward.recorded} == {1, 2}
    given = images(1).cuda().requires_grad_()
    tower(given).sum().backward()
    assert given.grad.any()
