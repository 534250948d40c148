"""Makes a model faster to train. Results stay the same, except that `float8` changes them a little.

Methods of modules are replaced by `models.components.replace_method`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from qwenvl_lit.models.components import blocks_of, network_of, replace_method
from qwenvl_lit.rendering.table import output_console
from qwenvl_lit.settings import Checkpointing, check_settings
from qwenvl_lit.training.block_compilation import compile_blocks
from qwenvl_lit.training.float8 import to_float8
from qwenvl_lit.training.memory import (
    GIB,
    available_gpu_memory,
    available_memory,
    blocks_to_checkpoint,
    images_with,
    memory_table,
    training_inputs,
)
from qwenvl_lit.training.step_plan import plan_step
from qwenvl_lit.training.strategies import sharding_of
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    import lightning

    from qwenvl_lit.models.protocols import Family
    from qwenvl_lit.training.adapters.methods import Adapter

# compile="auto" compiles from this many parameters and training batches on. On an H200 it costs
# 22 s at first and less with kernels from the cache. It saves about 0.1 s per batch of any size.
COMPILE_FROM_PARAMETERS = 1e9
COMPILE_FROM_BATCHES = 150
GRAPHED_IMAGES = 4  # up to this many images, the vision tower is bound by kernel launches

log = logging.getLogger(__name__)


class Speed:
    """The choices in the config group `speed`, and their application to a model.

    Args:
        compile: whether to compile the blocks; "auto": on a GPU, for models and runs above a
            minimum size (`COMPILE_FROM_PARAMETERS`, `COMPILE_FROM_BATCHES`).
        checkpointing: activation checkpointing: "none"; "full", every block (about a third more
            compute); "auto", as few blocks as needed for the longest batch, or for micro-batches
            that use the GPU well (`step_plan.EFFICIENT_TOKENS`), to fit on the GPU, none on a CPU.
        float8: whether frozen linear layers use FP8 matmuls, see `float8`.
        vision_cache: whether the features of a frozen vision tower are computed before the first
            step and kept on disk: the callback `VisionCache`.
        vision_cache_gb: the size limit of that cache.
    """

    def __init__(
        self,
        *,
        compile: Literal["auto"] | bool = "auto",  # noqa: A002, the key in the config
        checkpointing: Checkpointing = "auto",
        float8: bool = False,
        vision_cache: bool = False,
        vision_cache_gb: float = 100.0,
    ):
        settings = {
            "compile": compile,
            "checkpointing": checkpointing,
            "float8": float8,
            "vision_cache": vision_cache,
            "vision_cache_gb": vision_cache_gb,
        }
        check_settings("speed", settings)
        self.compile = compile
        self.checkpointing = checkpointing
        self.float8 = float8
        self.vision_cache = vision_cache
        self.vision_cache_gb = vision_cache_gb
        self.compiled = False  # set by `apply`: whether the blocks were compiled

    def apply(
        self, model: nn.Module, *, family: Family, adapter: Adapter, trainer: lightning.Trainer
    ) -> None:
        """Changes `model` in place. It has its adapter and is not sharded yet.

        Raises:
            DataError: a choice is impossible with this model, adapter, strategy or device.
        """
        on_gpu = trainer.strategy.root_device.type == "cuda"
        self._require_blocks(model)
        if self.float8:
            self._use_float8(model, family, trainer)
        self.compiled = self._compiles(model, trainer, on_gpu=on_gpu)
        if trainer.datamodule is not None and trainer.datamodule.cuts_steps:
            self._plan_steps(model, family, adapter, trainer, on_gpu=on_gpu)
        elif self.checkpointing == "full":
            checkpoint_blocks(model)
        elif self.checkpointing == "auto" and on_gpu:
            self._checkpoint_as_needed(model, family, adapter, trainer)
        if not self.compiled:
            return
        compile_blocks(model)
        if trainer.is_global_zero:
            print("Compiling blocks: the first step is slow; speed=eager turns it off", flush=True)
        if "vision" not in family.components:
            return
        tower = network_of(model).get_submodule(family.components["vision"])
        trains = any(tensor.requires_grad for tensor in tower.parameters())
        replayable = family.fixed_image_size and not trains
        if on_gpu and replayable and sharding_of(trainer)[0] != "fsdp":
            graph_vision_tower(tower)

    def _require_blocks(self, model: nn.Module) -> None:
        """Raises a DataError if a choice concerns the blocks of a network that has none."""
        if blocks_of(model):
            return
        for key, chosen in (("compile", True), ("checkpointing", "full")):
            if getattr(self, key) == chosen:
                raise DataError(
                    f"speed.{key}={str(chosen).lower()} concerns the blocks of the network, and "
                    f"{type(network_of(model)).__name__} has none (subclasses of transformers' "
                    f"GradientCheckpointingLayer); use speed.{key}=auto"
                )

    def _use_float8(self, model: nn.Module, family: Family, trainer: lightning.Trainer) -> None:
        if sharding_of(trainer)[0] == "fsdp":
            raise DataError(
                "speed.float8=true holds frozen layers in FP8, which strategy=fsdp cannot shard; "
                "use strategy=ddp"
            )
        exclude = ["head"]
        if self.vision_cache:
            # The tower runs once per image, and its cached features also serve runs without FP8
            exclude += ["vision", "resampler"]
        count = to_float8(model, family.components, exclude=exclude)
        log.info("%d frozen layers use FP8 matmuls", count)

    def _compiles(self, model: nn.Module, trainer: lightning.Trainer, *, on_gpu: bool) -> bool:
        if self.compile != "auto":
            return self.compile is True
        if not on_gpu or not blocks_of(model):
            return False
        parameters = sum(tensor.numel() for tensor in model.parameters())
        if parameters < COMPILE_FROM_PARAMETERS:
            return False
        batches = trainer.datamodule.steps_of_run() * trainer.accumulate_grad_batches
        return batches >= COMPILE_FROM_BATCHES

    def _plan_steps(
        self,
        model: nn.Module,
        family: Family,
        adapter: Adapter,
        trainer: lightning.Trainer,
        *,
        on_gpu: bool,
    ) -> None:
        """Cuts optimizer steps into micro-batches, and prints the memory of the largest one."""
        data = trainer.datamodule
        checkpointing = self.checkpointing
        if checkpointing == "auto" and not on_gpu:
            checkpointing = "none"
        available = available_memory(on_gpu=on_gpu, processes=trainer.num_devices)
        plan = plan_step(
            _meta_model(family, adapter),
            family,
            data.sizes,
            data.rows_per_step,
            available,
            checkpointing=checkpointing,
            same_count=sharding_of(trainer)[0] == "fsdp",
            **self._estimate_options(adapter, trainer),
        )
        if plan.checkpointed:
            checkpoint_blocks(model, plan.checkpointed)
        data.cut_steps(
            costs=plan.costs,
            max_bytes=plan.max_bytes,
            packed=family.supports_packing and _packing_is_fast(trainer),
            count=plan.count,
            most_tokens=None if plan.is_one_batch else plan.most_tokens,
        )
        if trainer.is_global_zero and plan.estimate.total >= GIB:
            batches = f"micro-batches of up to {plan.most_tokens:,} tokens"
            if plan.checkpointed:
                number, total = len(plan.checkpointed), len(blocks_of(model))
                batches += f", {number} of {total} blocks recomputed"
            device = "GPU" if on_gpu else "process"
            table = memory_table(plan.estimate, available, device=device, batches=batches)
            output_console(stderr=True).print(table)

    def _estimate_options(self, adapter: Adapter, trainer: lightning.Trainer) -> dict[str, Any]:
        """Returns the arguments of `estimate_memory` that do not depend on the rows."""
        sharding, gpus = sharding_of(trainer)
        return {
            "quantized": adapter.quantization is not None,
            "compiled": self.compiled,
            "sharding": sharding,
            "gpus": gpus,
        }

    def _checkpoint_as_needed(
        self, model: nn.Module, family: Family, adapter: Adapter, trainer: lightning.Trainer
    ) -> None:
        rows, tokens = trainer.datamodule.largest_batch()
        images = images_with(family, int(trainer.datamodule.sizes[2].max()))
        names = blocks_to_checkpoint(
            _meta_model(family, adapter),
            training_inputs(family, rows, tokens=tokens, images=images),
            family.components,
            available_gpu_memory(),
            **self._estimate_options(adapter, trainer),
        )
        if not names:
            return
        checkpoint_blocks(model, names)
        if trainer.is_global_zero:
            # A warning, because it costs time that fewer or shorter rows would not
            log.warning(
                "%d of %d blocks use activation checkpointing: batches have up to %d x %d tokens",
                len(names),
                len(blocks_of(model)),
                rows,
                tokens,
            )


def _meta_model(family: Family, adapter: Adapter) -> nn.Module:
    """Returns the network with its adapter on the meta device, in training mode."""
    with torch.random.fork_rng(devices=[]):  # peft draws the adapter before it becomes meta
        return adapter.apply(family.meta_model(), family).train()


def _packing_is_fast(trainer: lightning.Trainer) -> bool:
    """Returns whether there is a kernel for packed rows: else they need a mask of all tokens."""
    device = trainer.strategy.root_device
    half = str(trainer.precision).startswith(("bf16", "16"))
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


def checkpoint_blocks(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Turns activation checkpointing on for the blocks at the module paths `names`, or for all.

    Args:
        model: a transformers model, or one inside adapters.
    """
    # The method is named "activation_..." since transformers 5.2x, before "gradient_..."
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    # Only reentrant checkpointing needs an input that requires gradients. It would make autograd
    # compute the gradient of the first block's input for nothing.
    model.disable_input_require_grads()
    if names is not None:
        for path, block in blocks_of(model).items():
            block.gradient_checkpointing = path in names


def graph_vision_tower(tower: nn.Module) -> None:
    """Makes a frozen vision tower on a GPU replay CUDA graphs for small numbers of images.

    Launched one by one, its kernels would leave the GPU idle between them.
    """
    replace_method(tower, "forward", CUDAGraphed(tower.forward))


class CUDAGraphed:
    """A function of images (N, ...) without gradients, replayed as a CUDA graph.

    Each N up to `GRAPHED_IMAGES` is recorded at its second call.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function
        self.seen: set[tuple[Any, ...]] = set()
        self.recorded: dict[tuple[Any, ...], Recording] = {}  # by shape and dtype

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        key = (tuple(images.shape), images.dtype)
        too_many = len(images) > GRAPHED_IMAGES
        if torch.is_grad_enabled() or too_many or torch.cuda.is_current_stream_capturing():
            return self.function(images)
        if key not in self.seen:
            # The first call compiles and lets libraries choose kernels, which cannot be recorded
            self.seen.add(key)
            return self.function(images)
        if key not in self.recorded:
            self.recorded[key] = self._record(images)
        recording = self.recorded[key]
        recording.input.copy_(images)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, images: torch.Tensor) -> Recording:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        # Outside inference mode: training and validation use the same tensors
        with torch.inference_mode(False), torch.no_grad():
            graph_input = images.clone()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(graph_input)
            torch.cuda.current_stream().wait_stream(stream)
            # "thread_local": other threads pin batches in the meantime
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                graph_output = self.function(graph_input)
        return Recording(graph, graph_input, graph_output)


class Recording(NamedTuple):
    """A CUDA graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    input: torch.Tensor
    output: torch.Tensor
