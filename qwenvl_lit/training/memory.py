"""Estimates the GPU memory that training takes, on the meta device, before weights are loaded."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from rich.table import Table
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.models.components import blocks_of, component_of_tensor
from qwenvl_lit.training.optim import CHUNK
from qwenvl_lit.types import Conversation, ImageSource, Part, Turn

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family, Processor

GIB = 2**30
# Bytes per weight in NF4 with double quantization: 4 bits, a scale of one byte for 64 weights, and
# a float32 scale for 16,384 weights.
NF4_BYTES = 0.5 + 1 / 64 + 1 / 4096
FRAGMENTATION = 1.04  # factor by which fragmentation increases the memory
IMAGE_SIZE = (448, 448)  # of an image of which memory is estimated, in pixels
CUDA_CONTEXT = 0.5 * GIB  # memory of a GPU that the CUDA context takes
# How GPUs share the weights: a single GPU, a copy on each GPU, or shards.
Sharding = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The peak memory of training, in bytes per GPU."""

    weights: Mapping[str, float]  # component -> bytes
    gradients: float
    optimizer_states: float
    activations: float
    workspace: float  # temporary buffers of the optimizer step or of communication, the larger one

    @property
    def total(self) -> float:
        weights_and_gradients = sum(self.weights.values()) + self.gradients
        return weights_and_gradients + self.optimizer_states + self.activations + self.workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockActivations:
    """The bytes that a block saves in the forward pass for the backward pass."""

    input: int  # saved with activation checkpointing
    total: int  # saved without activation checkpointing


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """The bytes that a forward and backward pass takes in addition to weights and gradients."""

    blocks: Mapping[str, BlockActivations]  # by module path, without blocks that save nothing
    outside_blocks: int

    def bytes(self, checkpointed: int | None = 0, *, compiled: bool = False) -> int:
        """Returns the peak bytes if the first `checkpointed` blocks are checkpointed (None: all).

        Checkpointed blocks are recomputed one at a time. A compiled checkpointed block also saves
        its attention output, which is as large as its input, see `speed.keep_attention_outputs`.
        """
        blocks = list(self.blocks.values())
        recomputed = blocks[:checkpointed]
        saved = sum(block.total for block in blocks[len(recomputed) :])
        inputs = sum(block.input for block in recomputed)
        saved += 2 * inputs if compiled else inputs
        largest = max((block.total for block in recomputed), default=0)
        return self.outside_blocks + saved + largest


def estimate_memory(
    model: nn.Module,
    inputs: Mapping[str, Any],
    components: Mapping[str, str],
    *,
    quantized: bool = False,
    checkpointed: int | None = 0,
    compiled: bool = False,
    activations: Activations | None = None,
    sharding: Sharding = "none",
    gpus: int = 1,
) -> MemoryEstimate:
    """Estimates the memory per GPU for training `model` with `inputs`.

    Args:
        model: a network on the meta device, with its adapter.
        inputs: the arguments of the network's `forward`, on the meta device.
        components: component -> module path, see `Family.components`.
        quantized: whether the frozen linear layers except the head are quantized to 4 bits.
        checkpointed, compiled: see `Activations.bytes`.
        activations: the result of `activations_of(model, inputs)`, to avoid computing it again.
        sharding, gpus: how the weights are distributed, and over how many GPUs.
    """
    shards = gpus if sharding == "fsdp" else 1
    quantized_ids: set[int] = set()
    if quantized:
        quantized_ids = _quantized_weights(model, components)
    weights: dict[str, float] = defaultdict(float)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        itemsize = NF4_BYTES if id(tensor) in quantized_ids else tensor.dtype.itemsize
        component = component_of_tensor(name, components) or "other"
        weights[component] += tensor.numel() * itemsize / shards
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    gradients = sum(map(_bytes, trained)) / shards
    activations = activations or activations_of(model, inputs)
    saved = activations.bytes(checkpointed, compiled=compiled)
    workspace = _workspace(model, trained, gradients, sharding)
    # Quantized weights are dequantized one at a time.
    workspace += max((_bytes(t) for t in model.parameters() if id(t) in quantized_ids), default=0)
    if sharding == "fsdp":
        # For validation, every rank gathers all weights. The gradients are still in memory, except
        # those of bfloat16 weights, which `StochasticAdamW` frees.
        remaining_gradients = 0 if _has_bfloat16(trained) else gradients
        gathered = sum(weights.values()) * (gpus - 1) + remaining_gradients
        workspace = max(workspace, gathered - gradients - saved)
    present = [component for component in (*components, "other") if component in weights]
    return MemoryEstimate(
        weights={component: weights[component] for component in present},
        gradients=gradients,
        optimizer_states=2 * gradients,  # AdamW's two moments, in the dtype of the weights
        activations=saved,
        workspace=workspace,
    )


def _workspace(
    model: nn.Module, trained: list[nn.Parameter], gradients: float, sharding: Sharding
) -> float:
    rounding = 10 * 4 * CHUNK if _has_bfloat16(trained) else 0
    if sharding == "ddp":
        return max(rounding, gradients)  # DDP's buckets
    if sharding == "fsdp":
        # Two units are gathered at a time, the current and the next one. In addition, there are the
        # gradients of a unit and their float32 sum over the ranks.
        size, elements = max(_fsdp_units(model), key=lambda unit: unit[0])
        gathered = 2 * size
        if trained:
            gathered += size + 4 * elements
        return max(rounding, gathered)
    return rounding


def _has_bfloat16(tensors: list[nn.Parameter]) -> bool:
    return any(tensor.dtype == torch.bfloat16 for tensor in tensors)


def _fsdp_units(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yields bytes and elements of the units that FSDP gathers: blocks and embeddings."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer | nn.Embedding) or module is model:
            tensors = list(module.parameters(recurse=module is not model))
            yield sum(map(_bytes, tensors)), sum(tensor.numel() for tensor in tensors)


def activations_of(model: nn.Module, inputs: Mapping[str, Any]) -> Activations:
    """Runs a forward pass on the meta device, and counts the bytes that each block saves."""
    tensors = [*model.parameters(), *model.buffers()]
    # `_cdata` is the address of a storage. The public `data_ptr()` is 0 on the meta device.
    weights = {tensor.untyped_storage()._cdata for tensor in tensors}
    # The references keep counted storages alive, so that no other storage gets the same address.
    counted: dict[int, torch.UntypedStorage] = {}
    saved_bytes: dict[nn.Module | None, int] = defaultdict(int)
    current: list[nn.Module | None] = [None]
    input_bytes: dict[nn.Module, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in counted:
            counted[storage._cdata] = storage
            saved_bytes[current[-1]] += storage.nbytes()
        return tensor

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current.append(block)
        first, *_ = *args, *kwargs.values()
        input_bytes[block] = _bytes(first)

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        current.pop()

    blocks = blocks_of(model)
    hooks = []
    for block in blocks.values():
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(block.register_forward_hook(leave))
    try:
        with saved_tensors_hooks(count, lambda tensor: tensor), FusedAttention():
            output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    float32_logits = _bytes(output.logits) * 4 // output.logits.dtype.itemsize
    backward = 2 * max(float32_logits, max(input_bytes.values(), default=0))
    saved = {}
    for path, block in blocks.items():
        if saved_bytes.get(block):
            saved[path] = BlockActivations(input=input_bytes[block], total=saved_bytes[block])
    return Activations(blocks=saved, outside_blocks=saved_bytes[None] + backward)


class FusedAttention(TorchFunctionMode):
    """Makes attention on the meta device save the same tensors as fused kernels.

    By default, attention on the meta device saves the attention weights of all heads. A function
    that a family registers with transformers calls `scaled_dot_product_attention` on the meta
    device, whatever its own kernel is.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return _SavedByAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _SavedByAttention(torch.autograd.Function):
    @staticmethod
    def forward(context, query, key, value):
        attended = torch.empty_like(query)
        context.save_for_backward(query, key, value, attended)
        return attended

    @staticmethod
    def backward(context, gradient):
        raise NotImplementedError("only the forward pass is used")


def blocks_to_checkpoint(
    model: nn.Module,
    inputs: Mapping[str, Any],
    components: Mapping[str, str],
    available: float,
    **options: Any,
) -> list[str]:
    """Finds the fewest blocks to checkpoint for training to fit into `available` bytes per GPU.

    Args:
        options: further arguments of `estimate_memory`.

    Returns:
        The module paths of the blocks to checkpoint. If even checkpointing all blocks is not
        enough, the paths of all blocks.
    """
    activations = activations_of(model, inputs)
    blocks = list(activations.blocks)
    for count in range(len(blocks)):
        estimate = estimate_memory(
            model, inputs, components, checkpointed=count, activations=activations, **options
        )
        if fits(estimate, available):
            return blocks[:count]
    return blocks


def memory_table(estimate: MemoryEstimate, available: float, *, device: str, batches: str) -> Table:
    """Formats an estimate as a table in GiB.

    Args:
        available: the memory of a GPU or process, in bytes.
        device: "GPU" or "process", for the title.
        batches: a description of the batches, for the title.
    """
    table = Table(title=f"Estimated memory per {device} for {batches}")
    table.add_column("use")
    table.add_column("GiB", justify="right")
    for component, size in estimate.weights.items():
        table.add_row(f"weights: {component}", f"{size / GIB:.2f}")
    table.add_row("gradients", f"{estimate.gradients / GIB:.2f}")
    table.add_row("optimizer states", f"{estimate.optimizer_states / GIB:.2f}")
    table.add_row("activations", f"{estimate.activations / GIB:.2f}")
    table.add_row("workspace", f"{estimate.workspace / GIB:.2f}")
    table.add_section()
    table.add_row(f"total, of {available / GIB:.1f}", f"{estimate.total / GIB:.2f}")
    return table


def _quantized_weights(model: nn.Module, components: Mapping[str, str]) -> set[int]:
    """Returns the `id`s of the weights of frozen linear layers, except the head.

    These are the weights that are quantized with `bnb_config`.
    """
    ids = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.weight.requires_grad:
            continue
        if component_of_tensor(f"{name}.weight", components) != "head":
            ids.add(id(module.weight))
    return ids


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def usable(available: float) -> float:
    """Returns the bytes for tensors of a GPU with `available` bytes.

    The others are taken by fragmentation and by the CUDA context.
    """
    return (available - CUDA_CONTEXT) / FRAGMENTATION


def fits(estimate: MemoryEstimate, available: float) -> bool:
    """Returns whether the estimate is within the usable part of `available` bytes."""
    return estimate.total <= usable(available)


def free_unused_memory() -> None:
    """Frees objects that only refer to each other, and memory that torch keeps on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory(*, on_gpu: bool, processes: int) -> float:
    """Returns the bytes of the smallest GPU, or of host memory for each of the processes."""
    if on_gpu:
        return available_gpu_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes


def available_gpu_memory() -> float:
    """Returns the memory, in bytes, of the smallest GPU that is visible to this process."""
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return min(gpu.total_memory for gpu in gpus)


def training_inputs(
    family: Family, batch_size: int, *, tokens: int, images: int = 1, targets: int = 64
) -> dict[str, Any]:
    """Returns arguments of the network's `forward` for a batch of equal rows, on the meta device.

    Args:
        tokens: the number of tokens per row. It is increased to the number of tokens that images
            and targets take.
        images: the number of images per row; 0 for a model that reads none.
        targets: the number of supervised tokens per row.

    No row of the run is longer than the processor's `max_length`. Tokens, targets and images are
    reduced to what fits into it.
    """
    processor = copy(family.processor())
    limit, processor.max_length = processor.max_length, None
    if "vision" not in family.components:
        images = 0
    if limit is not None:
        tokens = min(tokens, limit)
        images, targets = _fitting(processor, images, targets, limit)
    length = processor.length(_row(images, 0, targets)).tokens
    sample = processor.encode(_row(images, tokens - length, targets))
    pad = Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision)
    inputs = family.inputs(pad([sample] * batch_size))
    return move_data_to_device(inputs, torch.device("meta"))


def images_with(family: Family, image_tokens: int) -> int:
    """Returns how many images of `training_inputs` have at least this many tokens."""
    if not image_tokens:
        return 0
    processor = copy(family.processor())
    processor.max_length = None
    return -(-image_tokens // processor.length(_row(1, 0, 1)).image_tokens)


def _fitting(processor: Processor, images: int, targets: int, limit: int) -> tuple[int, int]:
    """Returns how many of the images and targets a row of at most `limit` tokens can have.

    If there is no such row, those of the shortest row.
    """
    for count in range(images, -1, -1):
        spare = limit - processor.length(_row(count, 0, 1)).tokens
        if spare >= 0:
            return count, min(targets, 2 + spare)
    return 0, 1


def _row(images: int, question_tokens: int, targets: int) -> Conversation:
    """Makes a row. Its answer has one token at least, besides the end-of-turn token."""
    # A digit is one token in every vocabulary. The end-of-turn token is supervised as well.
    question, answer = "1" * max(0, question_tokens), "1" * max(1, targets - 1)
    parts: list[Part] = [ImageSource(Image.new("RGB", IMAGE_SIZE)) for _ in range(images)]
    parts.append(question)
    user = Turn(role="user", parts=tuple(parts))
    assistant = Turn(role="assistant", parts=(answer,))
    return Conversation(id="estimate", turns=(user, assistant))
