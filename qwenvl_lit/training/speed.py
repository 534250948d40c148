"""How a model is made fast to train. What it learns stays the same; `float8` alone changes it a little."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_lit.models.components import network_of
from qwenvl_lit.training.float8 import to_float8
from qwenvl_lit.training.memory import available_gpu_memory, blocks_to_recompute, training_inputs
from qwenvl_lit.training.strategies import sharding_of
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    import lightning

    from qwenvl_lit.models.protocols import Family
    from qwenvl_lit.training.adapters.methods import Adapter

Checkpointing = Literal["auto", "none", "full"]
PAYS_FROM = (
    1e9,
    300,
)  # numbers of a model and batches of a run from which compilation, half a minute or so, is worth it
FEW = 4  # images, for which a tower's kernels are shorter than it takes to launch them
RECOMPILATIONS = 16  # of a kind of block; beyond, what is new runs as it is. Two or three for training, as many to validate

log = logging.getLogger(__name__)


class Speed:
    """What is done to a model before it trains.

    Args:
        compile: whether its blocks are compiled; "auto": on a GPU, for a model and a run of some size (`PAYS_FROM`), and not over a base in
            4 bits, whose layers are another package's.
        checkpointing: how many blocks keep no more than their input and run again for their gradients, which takes a third more work:
            "none", "full" for all, "auto" for as many as the memory of a GPU asks with the longest rows of the data; on a CPU none.
        float8: frozen linear layers compute in 8 bits, see `float8`.
        vision_cache: what images become in a frozen tower is computed before the first step and kept on disk: a callback, `VisionCache`.
        vision_cache_gb: the most that it may take there.
    """

    def __init__(
        self,
        *,
        compile: Literal["auto"] | bool = "auto",
        checkpointing: Checkpointing = "auto",
        float8: bool = False,
        vision_cache: bool = False,
        vision_cache_gb: float = 100.0,
    ):
        flags = (("float8", float8, (True, False)), ("vision_cache", vision_cache, (True, False)))
        for name, value, choices in (("compile", compile, ("auto", True, False)), *flags):
            if value not in choices:
                raise ValueError(
                    f"speed.{name} is {', '.join(map(str, choices)).lower()}, got {value!r}"
                )
        if checkpointing not in get_args(Checkpointing):
            raise ValueError(
                f"speed.checkpointing is {', '.join(get_args(Checkpointing))}, got {checkpointing!r}"
            )
        self.compile = compile
        self.checkpointing = checkpointing
        self.float8 = float8
        self.vision_cache = vision_cache
        self.vision_cache_gb = vision_cache_gb
        self.compiled = False  # whether `apply` has found that it pays

    def apply(
        self, model: nn.Module, *, family: Family, adapter: Adapter, trainer: lightning.Trainer
    ) -> None:
        """Change `model`, which has its adapter and is not sharded yet, in place.

        Raises:
            DataError: the choices do not go with the model, the adapter, the strategy or the device.
        """
        on_gpu = trainer.strategy.root_device.type == "cuda"
        if self.float8:
            if sharding_of(trainer)[0] == "sharded":
                raise DataError(
                    "speed.float8=true holds frozen layers in 8 bits, which strategy=fsdp cannot share; use strategy=ddp"
                )
            stored = (
                ("vision", "resampler") if self.vision_cache else ()
            )  # used once, and for runs without 8 bits too
            log.info(
                "%d frozen layers compute in 8 bits",
                to_float8(model, family.components, but=("head", *stored)),
            )
        self.compiled = self.compile is True or (
            self.compile == "auto"
            and on_gpu
            and adapter.quantization is None
            and self._pays(model, trainer)
        )
        if self.checkpointing == "full":
            recompute_blocks(model)
        elif self.checkpointing == "auto" and on_gpu:
            self._recompute_what_is_needed(model, family, adapter, trainer)
        if self.compiled:
            compile_blocks(model)
            if trainer.is_global_zero:
                print(
                    "Blocks are compiled, which makes the first step long; speed=eager does without",
                    flush=True,
                )
            tower = network_of(model).get_submodule(family.components["vision"])
            if (
                on_gpu
                and sharding_of(trainer)[0] != "sharded"
                and not any(tensor.requires_grad for tensor in tower.parameters())
            ):
                replay_tower(tower)

    def _pays(self, model: nn.Module, trainer: lightning.Trainer) -> bool:
        numbers = sum(tensor.numel() for tensor in model.parameters())
        return (
            numbers >= PAYS_FROM[0]
            and trainer.datamodule.steps_of_run() * trainer.accumulate_grad_batches >= PAYS_FROM[1]
        )

    def _recompute_what_is_needed(
        self, model: nn.Module, family: Family, adapter: Adapter, trainer: lightning.Trainer
    ) -> None:
        rows, tokens = trainer.datamodule.largest_batch()
        spread, cards = sharding_of(trainer)
        outline = adapter.apply(family.meta_model(), family.components).train()
        options = {
            "four_bits": adapter.quantization is not None,
            "compiled": self.compiled,
            "spread": spread,
            "cards": cards,
        }
        inputs = training_inputs(family, rows, tokens=tokens)
        again = blocks_to_recompute(
            outline, inputs, family.components, available_gpu_memory(), **options
        )
        if again:
            recompute_blocks(model, again)
        if again and trainer.is_global_zero:
            log.warning(  # it costs time, and fewer or shorter rows would not need it
                "%d of %d blocks run again for their gradients: batches have up to %d x %d tokens",
                len(again),
                len(blocks_of(model)),
                rows,
                tokens,
            )


def recompute_blocks(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Let blocks of a transformers model, or of one inside adapters, run again for their gradients: those at these module paths, or all."""
    name = "activation_checkpointing_enable"  # since transformers 5.2x; "gradient_checkpointing_enable" before
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    model.disable_input_require_grads()  # for the reentrant kind alone; with it the first block's input would get a gradient for nothing
    if names is not None:
        for path, block in blocks_of(model).items():
            block.gradient_checkpointing = path in names


def blocks_of(model: nn.Module) -> dict[str, GradientCheckpointingLayer]:
    """The blocks of a transformers model by module path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }


def compile_blocks(model: nn.Module) -> None:
    """Compile `compute` of the blocks of a model. Blocks of a kind are alike, one compilation serves them all; it is done once more for all
    sizes when sizes change, and a few times for other modes. What sharding does around a block stays outside."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    for block in blocks_of(model).values():
        block.compute = Compiled(block, again=block.gradient_checkpointing)
        block.gradient_checkpointing = False  # it is compiled in: outside it would take as long again to launch what it launches


class Compiled:
    """`compute` of a block, compiled; as it was where torch cannot compile it, as happens with layers of other packages.

    Args:
        again: it runs again for its gradients.
    """

    def __init__(self, block: GradientCheckpointingLayer, *, again: bool):
        self.block = block
        self.again = again
        self.trains = any(tensor.requires_grad for tensor in block.parameters())
        self.compiled: tuple[Callable, Callable] | None = (
            torch.compile(computed),
            torch.compile(computed_again),
        )

    def __call__(self, x: torch.Tensor, *, kept: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if self.trains and torch.is_grad_enabled() and not x.requires_grad:
            x = (
                x.detach().requires_grad_()
            )  # the first block's: as those of the others, or it would be compiled for by itself
        if kept is not None:
            torch._dynamo.maybe_mark_dynamic(kept, 0)  # as many as a batch has targets
            kwargs["kept"] = kept
        again = self.again and torch.is_grad_enabled()
        if self.compiled is not None:
            try:
                return self.compiled[again](self.block, x, **kwargs)
            except TorchDynamoException as error:
                self.compiled = None
                log.warning(
                    "a block runs without compilation, which is slower: %s",
                    str(error).splitlines()[0],
                )
        return (computed_again if again else computed)(self.block, x, **kwargs)


def computed(block: GradientCheckpointingLayer, x: torch.Tensor, **kwargs: Any) -> Any:
    return type(block).compute(block, x, **kwargs)


def computed_again(block: GradientCheckpointingLayer, x: torch.Tensor, **kwargs: Any) -> Any:
    return checkpoint(
        type(block).compute, block, x, use_reentrant=False, context_fn=attention_is_kept, **kwargs
    )


def attention_is_kept() -> tuple[Any, Any]:
    """For `checkpoint`: what attention found, as much as a block's input, is kept. Torch takes its kernels for random ones, since they
    could drop out, and would set the state of the random numbers around each, which takes the host half a millisecond."""
    return create_selective_checkpoint_contexts(attention_kernels())


@cache
def attention_kernels() -> list[Any]:
    names = ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
    return [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]


def replay_tower(tower: nn.Module) -> None:
    """Record a frozen vision tower on a GPU, for each small number of images, and replay that: launched one by one, its kernels keep the
    GPU waiting for the host."""
    tower.forward = Replayed(tower.forward)


class Replayed:
    """A function of images (N, ...) without gradients, recorded as a CUDA graph for each N up to `FEW` at its second call."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function
        self.seen: set[tuple[Any, ...]] = set()
        self.recorded: dict[
            tuple[Any, ...], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]
        ] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        kind = (tuple(images.shape), images.dtype)
        if torch.is_grad_enabled() or len(images) > FEW or torch.cuda.is_current_stream_capturing():
            return self.function(images)
        if (
            kind not in self.seen
        ):  # what is compiled and chosen by libraries at first may not be recorded
            self.seen.add(kind)
            return self.function(images)
        if kind not in self.recorded:
            self.recorded[kind] = self._record(images)
        graph, given, found = self.recorded[kind]
        given.copy_(images)
        graph.replay()
        return found.clone()

    def _record(
        self, images: torch.Tensor
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # training and validation use the same tensors
            given = images.clone()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(given)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(
                graph, stream=stream, capture_error_mode="thread_local"
            ):  # other threads pin batches meanwhile
                found = self.function(given)
        return graph, given, found
