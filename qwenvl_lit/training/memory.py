"""What a run needs on each card, found out on the meta device before any weight is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from rich.table import Table
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.training.optim import CHUNK
from qwenvl_lit.types import Conversation, ImageSource, Turn

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family

GIB = 2**30
NF4 = (
    0.5 + 1 / 64 + 1 / 4096
)  # bytes of a weight in NF4 with double quantization: its bits, a byte for 64, a float for 16,384
SPARE = 1.04  # of what is estimated: memory in pieces too small to be used
CONTEXT = 0.5 * GIB  # what CUDA itself takes of a card
Sharding = Literal["one", "replicated", "sharded"]  # over the cards: a single one, DDP, FSDP


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on each card, at the moment when most are in use."""

    weights: Mapping[str, float]  # part -> bytes
    gradients: float
    states: float  # of the optimizer
    activations: float
    workspace: float  # buffers of the step or of the exchange between cards, whichever is larger

    @property
    def total(self) -> float:
        return (
            sum(self.weights.values())
            + self.gradients
            + self.states
            + self.activations
            + self.workspace
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes that one forward and backward pass holds besides weights and their gradients."""

    blocks: Mapping[
        str, tuple[int, int]
    ]  # module path of each block that keeps anything -> of its input, and of all that it keeps
    beside: int

    def bytes(self, recomputed: int | None = 0, *, compiled: bool = False) -> int:
        """The most at any moment, if so many blocks, the first ones, keep their input and one at a time runs again; None: all. Compiled
        ones keep what attention found too, which is as large: `speed.attention_is_kept`."""
        blocks = list(self.blocks.values())
        again = blocks[:recomputed]
        kept = sum(every for _, every in blocks[len(again) :]) + sum(
            given for given, _ in again
        ) * (2 if compiled else 1)
        return self.beside + kept + max((every for _, every in again), default=0)


def estimate_memory(
    model: nn.Module,
    inputs: Mapping[str, Any],
    components: Mapping[str, str],
    *,
    four_bits: bool = False,
    recomputed: int | None = 0,
    compiled: bool = False,
    activations: Activations | None = None,
    spread: Sharding = "one",
    cards: int = 1,
) -> MemoryEstimate:
    """What it takes to train `model`, on the meta device with its adapter, with `inputs` on each card.

    Args:
        parts: of the family, name -> module path.
        four_bits: linear layers but the head are held in 4 bits.
        recomputed: see `Activations.bytes`, as for `compiled`.
        activations: those of `model` and `inputs`, if they are known already.
    """
    share = cards if spread == "sharded" else 1
    narrow = _narrow(model, components) if four_bits else set()
    weights: dict[str, float] = defaultdict(float)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        size = tensor.numel() * (NF4 if id(tensor) in narrow else tensor.dtype.itemsize)
        weights[component_of_tensor(name, components) or "other"] += size / share
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    gradients = sum(map(_bytes, trained)) / share
    held = (activations or activations_of(model, inputs)).bytes(recomputed, compiled=compiled)
    workspace = _workspace(model, trained, gradients, spread) + max(
        (_bytes(t) for t in model.parameters() if id(t) in narrow), default=0
    )
    if (
        spread == "sharded"
    ):  # to validate, every rank has all weights; stochastic rounding has given the gradients back by then
        at_rest = 0 if any(tensor.dtype == torch.bfloat16 for tensor in trained) else gradients
        workspace = max(workspace, sum(weights.values()) * (cards - 1) + at_rest - gradients - held)
    return MemoryEstimate(
        weights={part: weights[part] for part in (*components, "other") if part in weights},
        gradients=gradients,
        states=2 * gradients,  # of the type of the weights, as AdamW keeps them
        activations=held,
        workspace=workspace,
    )


def _workspace(
    model: nn.Module, trained: list[nn.Parameter], gradients: float, spread: Sharding
) -> float:
    rounding = 10 * 4 * CHUNK if any(tensor.dtype == torch.bfloat16 for tensor in trained) else 0
    if spread == "replicated":
        return max(rounding, gradients)  # DDP's buckets
    if (
        spread == "sharded"
    ):  # the largest unit and the next one, gathered; its gradients, and their sum in float32
        largest = max(_units(model), key=lambda unit: unit[0])
        return max(rounding, 2 * largest[0] + (largest[0] + 4 * largest[1] if trained else 0))
    return rounding


def _units(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Bytes and elements of what FSDP gathers at once: blocks, and the large tables beside them."""
    for module in model.modules():
        if isinstance(module, (GradientCheckpointingLayer, nn.Embedding)) or module is model:
            tensors = list(module.parameters(recurse=module is not model))
            yield sum(map(_bytes, tensors)), sum(tensor.numel() for tensor in tensors)


def activations_of(model: nn.Module, inputs: Mapping[str, Any]) -> Activations:
    """A forward pass on the meta device tells what autograd keeps for each block."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage gets its address
    bytes_of: dict[nn.Module | None, int] = defaultdict(int)
    inside: list[nn.Module | None] = [None]
    entered: dict[nn.Module, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage
            bytes_of[inside[-1]] += storage.nbytes()
        return tensor

    def enter(block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inside.append(block)
        entered[block] = _bytes(args[0])

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    blocks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }
    hooks = [
        (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
        for block in blocks.values()
    ]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor), FusedAttention():
            output = model(**inputs)
    finally:
        for handle in chain(*hooks):
            handle.remove()
    backward = 2 * max(
        _bytes(output.logits) * 4 // output.logits.dtype.itemsize, max(entered.values(), default=0)
    )
    found = {
        name: (entered[block], bytes_of[block])
        for name, block in blocks.items()
        if bytes_of.get(block)
    }
    return Activations(blocks=found, beside=bytes_of[None] + backward)


class FusedAttention(TorchFunctionMode):
    """Attention that keeps what fused kernels keep; on the meta device torch itself would keep all weights of all heads."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return _Attended.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(context, query, key, value):
        attended = torch.empty_like(query)
        context.save_for_backward(query, key, value, attended)
        return attended

    @staticmethod
    def backward(context, gradient):
        raise NotImplementedError("nothing is computed here: only what would be kept is counted")


def blocks_to_recompute(
    model: nn.Module,
    inputs: Mapping[str, Any],
    components: Mapping[str, str],
    room: float,
    **options: Any,
) -> list[str]:
    """Module paths of the fewest blocks that have to run again for their gradients, so that training fits into `room` bytes of a card; all
    if nothing is enough. `options` are those of `estimate_memory`."""
    activations = activations_of(model, inputs)
    blocks = list(activations.blocks)
    needs = (
        estimate_memory(
            model, inputs, components, recomputed=count, activations=activations, **options
        )
        for count in range(len(blocks) + 1)
    )
    return blocks[
        : next((count for count, found in enumerate(needs) if fits(found, room)), len(blocks))
    ]


def memory_table(found: MemoryEstimate, room: float | None, what: str) -> Table:
    """For people, in GiB. `room` is the memory of a card."""
    table = Table(title=f"Memory on each card, estimated for {what}")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for part, size in found.weights.items():
        table.add_row(f"weights: {part}", f"{size / GIB:.2f}")
    for name in ("gradients", "states", "activations", "workspace"):
        title = {"states": "optimizer states"}.get(name, name)
        table.add_row(title, f"{getattr(found, name) / GIB:.2f}")
    table.add_section()
    table.add_row(
        "all" if room is None else f"all, of {room / GIB:.1f}", f"{found.total / GIB:.2f}"
    )
    return table


def _narrow(model: nn.Module, components: Mapping[str, str]) -> set[int]:
    """Ids of the weights that `bnb_config` packs: those of linear layers, but the head and adapters."""
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and component_of_tensor(f"{name}.weight", components) != "head"
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def fits(found: MemoryEstimate, room: float) -> bool:
    return found.total * SPARE + CONTEXT <= room


def available_gpu_memory() -> float:
    """Bytes of the smallest GPU that this process sees."""
    return min(
        torch.cuda.get_device_properties(number).total_memory
        for number in range(torch.cuda.device_count())
    )


def training_inputs(
    family: Family, rows: int, *, tokens: int, images: int = 1, targets: int = 64
) -> dict[str, Any]:
    """Arguments of the network for `rows` equal rows, on the meta device: of about so many tokens, so many of them learned."""
    processor = family.processor()
    if most := processor.settings.get("max_length"):
        tokens = min(tokens, most)
    answer = "1" * max(
        1, targets - 1
    )  # a digit is a token in every vocabulary, and an end mark is learned too
    length = processor.length(_row(images, "", answer))[0]
    sample = processor.encode(_row(images, "1" * max(0, tokens - length), answer))
    inputs = family.inputs(Pad(pad_id=processor.pad_id)([sample] * rows))
    return {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def _row(images: int, question: str, answer: str) -> Conversation:
    parts = (*(ImageSource(Image.new("RGB", (8, 8))) for _ in range(images)), question)
    return Conversation(
        id="a row",
        turns=(
            Turn(role="user", parts=parts),
            Turn(role="assistant", parts=(answer,)),
        ),
    )
