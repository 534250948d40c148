"""Speed-ups change neither what a model computes nor what is trained."""

import logging
from collections import Counter
from collections.abc import Callable

import lightning
import pytest
import torch
from small_network import CLOSE, IMAGE, image_positions, images, small_network, text
from small_run import read
from tiny import tiny_family
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy_task import trainer

from qwenvl_lit.callbacks.run_log import RunLog
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.components import blocks_of, replace_method
from qwenvl_lit.models.dynamo import compiled_graphs
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.segments import attend_in_segments
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.block_compilation import (
    attention_kernels,
    checkpointed_forward,
    compile_blocks,
    keep_attention_outputs,
)
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.training.speed import Speed, checkpoint_blocks, graph_vision_tower

LORA = LoRA(rank=2, alpha=4, dropout=0.0, targets=r"transformer\.h\.\d+\.attn\.c_attn")
EVERYWHERE = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")


def adapted(adapter) -> nn.Module:
    torch.manual_seed(0)
    model = adapter.apply(small_network(), QwenVLFamily).train()
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
def graphs(monkeypatch) -> Callable[[], int]:
    """Makes compilation fast, and counts the graphs compiled in a test.

    Graphs are captured and differentiated as usual, but no kernels are generated, which would take
    minutes.
    """
    torch.compiler.reset()
    torch_compile = torch.compile
    options = {"backend": "aot_eager"}
    monkeypatch.setattr(
        torch, "compile", lambda function, **given: torch_compile(function, **given, **options)
    )
    before = compiled_graphs()
    return lambda: compiled_graphs() - before


@pytest.mark.parametrize("adapter", [Full(), LORA, EVERYWHERE], ids=["full", "lora", "lora_all"])
def test_compiled_blocks_give_the_same_gradients(adapter, graphs):
    model = adapted(adapter)
    expected = gradients(model, batch(2, 7))
    compile_blocks(model)
    compiled = gradients(model, batch(2, 7))
    assert graphs() == 2  # one for the blocks of the tower, one for those of the language model
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, **CLOSE)


def test_blocks_have_one_graph_for_all_sizes_from_the_first_batch(graphs):
    """A resumed run, whose first batch has another size, computes with the same kernels."""
    model = adapted(LORA)
    compile_blocks(model)
    gradients(model, batch(2, 7))
    compiled = graphs()
    assert compiled <= 3  # vision blocks, language blocks, the last one with supervised positions
    for rows, length in ((3, 9), (4, 5), (2, 11), (5, 20), (3, 3)):
        gradients(model, batch(rows, length))
    assert graphs() == compiled
    with torch.no_grad():
        for rows in (2, 3, 4):
            model(**batch(rows, 6))
    assert graphs() <= 2 * compiled


@pytest.mark.usefixtures("graphs")
def test_compiled_checkpointed_blocks_give_the_same_gradients():
    model = adapted(LORA)
    expected = gradients(model, batch(2, 7))
    checkpoint_blocks(model)
    compile_blocks(model)
    for name, gradient in gradients(model, batch(2, 7)).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_compiled_checkpointed_blocks_save_less_and_recompute_the_same_dropout(device):
    """Compares gradients with differences of the loss; the compiler generates kernels."""
    torch.compiler.reset()
    model = adapted(LoRA(rank=2, alpha=4, dropout=0.5, targets=LORA.targets)).to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch(2, 7).items()}
    weight = next(tensor for name, tensor in model.named_parameters() if "lora_B" in name)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        torch.manual_seed(7)
        value = model(**inputs).loss
        with torch.no_grad():
            weight.sub_(direction, alpha=step)
        return value

    def saved_bytes() -> int:
        sizes: list[int] = []

        def save(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss(0.0)
        return sum(sizes)

    torch.manual_seed(7)
    compile_blocks(model)
    usual = saved_bytes()
    for block in blocks_of(model).values():
        replace_method(block, "compute", None)
    checkpoint_blocks(model)
    compile_blocks(model)
    assert saved_bytes() < 0.8 * usual  # weights are counted, too
    torch.manual_seed(7)
    model(**inputs).loss.backward()
    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    # 0.022 off on an H100; gradients with other dropout masks are 0.6 off and more
    rtol = 0.02 if device == "cpu" else 0.05
    expected = (weight.grad * direction).sum()
    torch.testing.assert_close(expected, slope.detach(), rtol=rtol, atol=1e-3)


def test_attention_outputs_that_checkpointing_keeps_are_those_of_torch():
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    calls: list[object] = []
    query = torch.ones(1, 2, 8, 16)
    with Calls():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert set(calls) & set(attention_kernels())


def test_a_block_that_cannot_be_compiled_runs_uncompiled_with_a_warning(monkeypatch, caplog):
    def refused(function, **options):
        def compiled(*args, **kwargs):
            raise Unsupported("a layer of another package")

        return compiled

    model = adapted(LORA)
    expected = gradients(model, batch(2, 7))
    monkeypatch.setattr(torch, "compile", refused)
    compile_blocks(model)
    with caplog.at_level(logging.WARNING):
        uncompiled = gradients(model, batch(2, 7))
    warnings = {record.getMessage() for record in caplog.records}
    assert warnings == {
        "blocks run without compilation, which is slower, since Unsupported: a layer of another "
        "package"
    }
    block_types = {type(block) for block in blocks_of(model).values()}
    assert len(caplog.records) == len(block_types) < len(blocks_of(model))
    for name, gradient in uncompiled.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


def test_checkpointing_that_cannot_be_part_of_a_graph_stays_outside(monkeypatch, caplog):
    forwards = Counter()

    def compile_forward_alone(function, **options):
        def compiled(block, x, **kwargs):
            if function is checkpointed_forward:
                raise Unsupported("no partition of the graph")
            forwards[block] += 1
            return function(block, x, **kwargs)

        return compiled

    model = adapted(LORA)
    expected = gradients(model, batch(2, 7))
    monkeypatch.setattr(torch, "compile", compile_forward_alone)
    checkpoint_blocks(model)
    compile_blocks(model)
    recomputed = gradients(model, batch(2, 7))
    assert "outside their graph, since Unsupported: no partition of the graph" in caplog.text
    trained = [block for block in blocks_of(model).values() if any_trained(block)]
    assert {forwards[block] for block in trained} == {2}
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


def any_trained(module: torch.nn.Module) -> bool:
    return any(tensor.requires_grad for tensor in module.parameters())


@pytest.mark.parametrize("adapter", [Full(), LORA], ids=["full", "lora"])
def test_all_or_some_blocks_are_checkpointed_and_embeddings_get_no_gradient_for_it(adapter):
    model = adapted(adapter)
    runs = Counter()
    for path, block in blocks_of(model).items():
        block.ln_1.register_forward_pre_hook(lambda norm, args, path=path: runs.update([path]))
    checkpoint_blocks(model, list(blocks_of(model))[:1])
    gradients(model, batch(1, 5))
    first, *others = blocks_of(model)
    assert runs[first] == 2
    assert {runs[path] for path in others} == {1}
    checkpoint_blocks(model)
    assert all(block.gradient_checkpointing for block in blocks_of(model).values())
    assert model.get_input_embeddings()(torch.tensor([[1]])).requires_grad == isinstance(
        adapter, Full
    )


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"compile": "always"}, "speed.compile must be one of auto, true, false, got 'always'"),
        ({"checkpointing": True}, "speed.checkpointing must be one of auto, none, full, got True"),
        ({"float8": "yes"}, "speed.float8 must be true or false, got 'yes'"),
    ],
)
def test_unknown_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Speed(**choices)


class ForbidSynchronization(lightning.Callback):
    """Makes every synchronization an error, data loading included, from batch 4 to batch 11."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 3:
            torch.cuda.set_sync_debug_mode("error")
        elif batch_idx == 11:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_attention_of_packed_rows_is_not_recomputed():
    bounds = torch.tensor([0, 5, 16], dtype=torch.int32, device="cuda")

    def compute(x_BTD: torch.Tensor) -> torch.Tensor:
        x_BHTK = x_BTD.unflatten(-1, (2, 64)).transpose(1, 2)
        attended = attend_in_segments(x_BHTK, x_BHTK, x_BHTK, bounds, 11, scaling=0.125)
        return attended.flatten(2).square()

    x_BTD = torch.randn(1, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plain = torch.autograd.grad(compute(x_BTD).sum(), x_BTD)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = checkpoint(compute, x_BTD, use_reentrant=False, context_fn=keep_attention_outputs)
        recomputed = torch.autograd.grad(output.sum(), x_BTD)[0]
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_flash_attention_forward"] == 1
    assert calls["aten::_flash_attention_backward"] == 1
    assert torch.equal(recomputed, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
def test_no_training_step_synchronizes(tmp_path, packing):
    module = VisionLanguageModule(
        family=tiny_family(),
        adapter=LoRA(rank=2, alpha=4, dropout=0.1, targets="all-linear"),
        generation=Generation(),
        metrics={},
        optim=AdamW(lr=1e-2),
        speed=Speed(checkpointing="full"),
    )
    sizes = {"max_tokens": 128, "packing": True} if packing else {"batch_size": 2}
    data = DataModule(
        processor=module.processor,
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
    fitting = trainer(
        tmp_path,
        Throughput(),
        RunLog(),
        ForbidSynchronization(),
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        max_epochs=-1,
        **options,
    )
    try:
        fitting.fit(module, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fitting.global_step == 8


@pytest.mark.gpu
def test_a_graphed_tower_gives_the_features_of_the_tower():
    tower = small_network().cuda().transformer.visual
    plain_forward = tower.forward
    graph_vision_tower(tower)
    for seed, count in enumerate((1, 2, 1, 2, 1, 2, 7, 1)):
        pixels = images(count, seed=seed).cuda()
        with torch.inference_mode() if seed == 4 else torch.no_grad():
            torch.testing.assert_close(tower(pixels), plain_forward(pixels), **CLOSE)
    assert {shape[0] for shape, _ in tower.forward.recorded} == {1, 2}
    pixels = images(1).cuda().requires_grad_()
    tower(pixels).sum().backward()
    assert pixels.grad.any()
