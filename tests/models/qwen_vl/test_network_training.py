"""Ready for training: compiled, with gradient checkpointing, with adapters, with batches of text alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_network import (
    CLOSE,
    IMAGE,
    LOSS,
    image_positions,
    images,
    small_network,
    talk_of_two,
    tensor,
    text,
)
from torch import nn

# Float32 sums in another order. Entries whose true gradient is zero (key biases: softmax does not see them) are noise of 1e-8.
GRADIENT = {"rtol": 1e-4, "atol": 1e-6}


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA on every linear layer, its second matrices not zero, so that both have gradients."""
    torch.manual_seed(0)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).train()


def checkpointed(model: nn.Module) -> None:
    """As transformers does it by default; its name since 5.2x, or before."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def blocks(model: nn.Module) -> list[nn.Module]:
    return [*model.transformer.h, *model.transformer.visual.transformer["resblocks"]]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_not_compiled(backend):
    """One graph, with its backward pass; `inductor` also writes and compiles its kernels."""
    torch._dynamo.reset()
    model, batch = small_network().train(), talk_of_two()
    kept = batch["attention_mask"].bool()
    expected, plain = model(**batch, labels=batch["input_ids"]), gradients(model, batch)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    out = compiled(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(out.logits[kept], expected.logits[kept], **CLOSE)
    torch.testing.assert_close(out.loss, expected.loss, **LOSS)
    for name, gradient in gradients(compiled, batch).items():
        torch.testing.assert_close(gradient, plain[name.removeprefix("_orig_mod.")], **GRADIENT)


def test_checkpointed_blocks_run_again_for_their_gradients_in_the_tower_too():
    model, batch = small_network().train(), talk_of_two()
    runs = {
        block.ln_1: 0 for block in blocks(model)
    }  # of what is inside: hooks of a block itself stay outside its checkpoint
    for norm in runs:
        norm.register_forward_pre_hook(lambda norm, args: runs.__setitem__(norm, runs[norm] + 1))
    gradients(model, batch)
    assert set(runs.values()) == {1}
    checkpointed(model)
    gradients(model, batch)
    assert set(runs.values()) == {1 + 2}


def test_checkpointing_changes_no_gradient_and_needs_no_input_with_one():
    """The reentrant kind gives adapters none where what comes in has none, as pixels and frozen embeddings."""
    model, batch = with_adapters(small_network()), talk_of_two()
    expected = gradients(model, batch)
    checkpointed(model.base_model.model)
    assert all(block.gradient_checkpointing for block in blocks(model.base_model.model))
    found = gradients(model, batch)
    assert len(found) == len(expected) > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **GRADIENT)
        assert gradient.any()


def test_adapters_of_the_tower_have_gradients_of_zero_from_text_alone():
    """Not none: in a step of several ranks, others may have images, and gradients are averaged."""
    found = gradients(with_adapters(small_network()), {"input_ids": tensor(text(8))})
    tower = {name: gradient for name, gradient in found.items() if ".visual." in name}
    assert any("attn_pool.attn.q_proj" in name for name in tower)
    assert all(gradient is not None and not gradient.any() for gradient in tower.values())
    assert all(gradient.any() for name, gradient in found.items() if name not in tower)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone: DDP checks the same things as among several."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapt", [False, True])
def test_ranks_do_not_wait_for_a_batch_without_images(one_rank, adapt):
    """DDP refuses the step after one in which a trained parameter took no part."""
    model = with_adapters(small_network()) if adapt else small_network().train()
    ranked = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    for batch in ({"input_ids": tensor(text(8))}, talk_of_two(), {"input_ids": tensor(text(8))}):
        ranked(**batch, labels=batch["input_ids"]).loss.backward()
    assert ranked(input_ids=tensor(text(8))).logits.isfinite().all()


def test_packed_samples_have_the_loss_and_gradients_of_a_padded_batch():
    model = small_network().train()
    rows = [IMAGE + text(9), text(15, seed=1)]
    pixels = torch.randn(1, 3, 16, 16)
    padded = tensor(rows[0], rows[1])
    labels = padded.clone()
    labels[
        :, 0
    ] = (
        -100
    )  # nothing comes before the first token of a row; in a packed one, the sample before it does
    batch = {
        "pixel_values": pixels,
        "labels": labels,
        "input_ids": padded,
        "attention_mask": torch.ones_like(padded),
    }
    expected = {name: gradient.clone() for name, gradient in _gradients_of(model, batch).items()}
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = {
        "pixel_values": pixels,
        "labels": labels.view(1, -1),
        "input_ids": padded.view(1, -1),
        "position_ids": positions,
    }
    for name, gradient in _gradients_of(model, packed).items():
        torch.testing.assert_close(gradient, expected[name], **GRADIENT)


@pytest.mark.gpu
def test_on_a_gpu_packed_samples_need_no_mask_and_nothing_waits_for_them():
    """Bounds of samples and their mask are two ways to the same loss and gradients: bfloat16 products in another order."""
    model = small_network().bfloat16().cuda().train()
    rows = [IMAGE + text(9), text(31, seed=1), IMAGE + text(2, seed=2)]
    lengths = [*map(len, rows), 8]  # and padding
    ids = tensor([id for row in rows for id in row] + [0] * 8)
    packed = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "pixel_values": images(2).bfloat16(),
        "vision_positions": image_positions(ids.tolist()),
        "target_positions": torch.tensor([7, 8, 20, 21, 22, 50, 51]),
    }
    packed = {name: value.cuda() for name, value in packed.items()}
    expected = {name: gradient.clone() for name, gradient in _gradients_of(model, packed).items()}
    bounds = torch.tensor([0, *lengths, 0, 0], device="cuda").cumsum(0, dtype=torch.int32)
    kernel = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds) | dict.fromkeys(
        ("max_length_q", "max_length_k"), 40
    )
    _gradients_of(model, packed | kernel)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = _gradients_of(model, packed | kernel)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    largest = max(
        gradient.norm() for gradient in expected.values()
    )  # beside it, gradients that are zero but for rounding count nothing
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 0.05 * expected[
            name
        ].norm() + 1e-3 * largest, name


def _gradients_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
