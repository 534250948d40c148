"""Training the network: compiled, with activation checkpointing, with adapters, on text alone."""

from collections import Counter
from itertools import chain

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

# Float32 sums in another order. Entries whose true gradient is zero (key biases: they cancel in the
# softmax) are noise of 1e-8.
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
    """LoRA on every linear layer, initialized so that both of its matrices have gradients."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora).train()


def checkpoint_activations(model: nn.Module) -> None:
    """Enables transformers' default; the method was renamed in 5.2x."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def blocks(model: nn.Module) -> list[nn.Module]:
    return [*model.transformer.h, *model.transformer.visual.transformer["resblocks"]]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiling_changes_no_logits_and_no_gradients(backend):
    """One graph, with its backward pass; `inductor` also generates and compiles kernels."""
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


def test_checkpointed_blocks_are_recomputed_in_the_tower_too():
    model, batch = small_network().train(), talk_of_two()
    runs = Counter()
    # Hooks inside the blocks: those of a block itself run outside its checkpoint.
    norms = [block.ln_1 for block in blocks(model)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, args: runs.update([norm]))
    gradients(model, batch)
    assert runs == dict.fromkeys(norms, 1)
    runs.clear()
    checkpoint_activations(model)
    gradients(model, batch)
    assert runs == dict.fromkeys(norms, 2)


def test_checkpointing_changes_no_gradient_even_if_inputs_need_none():
    """Reentrant checkpointing would lose the gradients of adapters on pixels and frozen embeddings,
    which need no gradient themselves."""
    model, batch = with_adapters(small_network()), talk_of_two()
    expected = gradients(model, batch)
    checkpoint_activations(model.base_model.model)
    assert all(block.gradient_checkpointing for block in blocks(model.base_model.model))
    checkpointed = gradients(model, batch)
    assert len(checkpointed) == len(expected) > 0
    for name, gradient in checkpointed.items():
        torch.testing.assert_close(gradient, expected[name], **GRADIENT)
        assert gradient.any()


def test_adapters_of_the_tower_have_zero_gradients_on_text_alone():
    """Zero, not None: other ranks may have images in the same step, and gradients are averaged."""
    by_name = gradients(with_adapters(small_network()), {"input_ids": tensor(text(8))})
    assert any("visual.attn_pool.attn.q_proj" in name for name in by_name)
    for name, gradient in by_name.items():
        assert gradient is not None, name
        assert bool(gradient.any()) == (".visual." not in name), name


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone, in which DDP makes all its checks."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapt", [False, True])
def test_ddp_accepts_a_batch_without_images(one_rank, adapt):
    """DDP refuses the step after one in which a trained parameter was not used."""
    model = with_adapters(small_network()) if adapt else small_network().train()
    ranked = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    for batch in ({"input_ids": tensor(text(8))}, talk_of_two(), {"input_ids": tensor(text(8))}):
        ranked(**batch, labels=batch["input_ids"]).loss.backward()
    assert ranked(input_ids=tensor(text(8))).logits.isfinite().all()


def test_packed_samples_have_the_gradients_of_a_padded_batch():
    model = small_network().train()
    rows = [IMAGE + text(9), text(15, seed=1)]
    pixels = torch.randn(1, 3, 16, 16)
    padded = tensor(rows[0], rows[1])
    labels = padded.clone()
    # No token precedes the first one of a row; in a packed row the previous sample does.
    labels[:, 0] = -100
    batch = {
        "pixel_values": pixels,
        "labels": labels,
        "input_ids": padded,
        "attention_mask": torch.ones_like(padded),
    }
    expected = _gradients_of(model, batch)
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
def test_on_a_gpu_packed_samples_need_no_mask_and_do_not_synchronize():
    """Sample bounds give the gradients of a mask, up to the order of bfloat16 sums."""
    model = small_network().bfloat16().cuda().train()
    rows = [IMAGE + text(9), text(31, seed=1), IMAGE + text(2, seed=2)]
    lengths = [*map(len, rows), 8]  # and padding
    ids = tensor([*chain.from_iterable(rows), *[0] * 8])
    packed = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "pixel_values": images(2).bfloat16(),
        "vision_positions": image_positions(ids.tolist()),
        "target_positions": torch.tensor([7, 8, 20, 21, 22, 50, 51]),
    }
    packed = {name: value.cuda() for name, value in packed.items()}
    expected = _gradients_of(model, packed)
    bounds = torch.tensor([0, *lengths, 0, 0], device="cuda").cumsum(0, dtype=torch.int32)
    kernel = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    kernel |= {"max_length_q": 40, "max_length_k": 40}
    _gradients_of(model, packed | kernel)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_bounds = _gradients_of(model, packed | kernel)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Gradients that are zero up to rounding are compared with the largest one.
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in with_bounds.items():
        tolerance = 0.05 * expected[name].norm() + 1e-3 * largest
        assert (gradient - expected[name]).norm() <= tolerance, name


def _gradients_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()  # drops the earlier gradients, so that those returned before stay unchanged
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
