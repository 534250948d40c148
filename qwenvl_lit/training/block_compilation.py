"""Compiles the blocks of a network, with their activation checkpointing, for training.

Results stay the same. Methods of blocks are replaced by `models.components.replace_method`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_lit.models.components import blocks_of, replace_method
from qwenvl_lit.models.dynamo import CompileError, allow_recompilations, mark_dynamic

# Recompilations allowed per block type; further shapes run uncompiled. Training needs two or three,
# validation as many.
RECOMPILATIONS = 16

log = logging.getLogger(__name__)


def compile_blocks(model: nn.Module) -> None:
    """Compiles `compute` of each block of a model, or `forward` of blocks without this method.

    All blocks of a type share one compiled graph with dynamic sizes. It is recompiled a few times
    for other modes. FSDP hooks stay outside the graph.
    """
    allow_recompilations(RECOMPILATIONS)
    functions: dict[type[nn.Module], CompiledFunctions] = {}
    for block in blocks_of(model).values():
        shared = functions.setdefault(type(block), CompiledFunctions())
        compiled = CompiledBlock(block, shared, checkpointed=block.gradient_checkpointing)
        replace_method(block, compiled_method(type(block)), compiled)
        # Checkpointing is part of the graph. Outside, every kernel would be launched from Python
        # again to recompute the block.
        block.gradient_checkpointing = False


def compiled_method(block: type[nn.Module]) -> str:
    """Returns the name of the method that computes a block of this type."""
    return "compute" if hasattr(block, "compute") else "forward"


class CompiledFunctions:
    """How the blocks of a type are computed: what torch cannot compile is replaced, for all.

    Layers of other packages may not be compilable.
    """

    def __init__(self) -> None:
        self.forward: Callable[..., Any] = torch.compile(block_forward)
        # Torch computes a checkpoint that is not one graph without compiling any of it. With
        # `fullgraph`, that is an error, see `replace`.
        self.checkpointed_forward: Callable[..., Any] = torch.compile(
            checkpointed_forward, fullgraph=True
        )
        self._replaced = False

    def replace(self, error: Exception, *, checkpointed: bool) -> None:
        """Replaces the function whose compilation has failed.

        A checkpointed function becomes one that recomputes a compiled forward pass. All others are
        computed without compilation.
        """
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
        if checkpointed and not self._replaced:
            self._replaced = True
            self.checkpointed_forward = partial(recomputed, self)
            log.warning("checkpointing of compiled blocks is outside their graph, since %s", reason)
        else:
            self.forward, self.checkpointed_forward = block_forward, checkpointed_forward
            log.warning("blocks run without compilation, which is slower, since %s", reason)


class CompiledBlock:
    """The method of a block that computes it, compiled if possible.

    Args:
        functions: shared by all blocks of the type.
        checkpointed: whether the block is recomputed for the backward pass.
    """

    def __init__(
        self, block: GradientCheckpointingLayer, functions: CompiledFunctions, *, checkpointed: bool
    ):
        self.block = block
        self.functions = functions
        self.checkpointed = checkpointed
        self.trains = any(tensor.requires_grad for tensor in block.parameters())
        method = getattr(type(block), compiled_method(type(block)))
        _, self.first_name, *_ = inspect.signature(method).parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = args or (kwargs.pop(self.first_name),)
        x, *others = args
        if self.trains and torch.is_grad_enabled() and not x.requires_grad:
            # The first block's input. It would need a graph of its own.
            x = x.detach().requires_grad_()
        dims = getattr(type(self.block), "dynamic_dims", None)
        mark_sizes_dynamic(x, (*others, *kwargs.values()), dims)
        if kwargs.get("output_positions") is not None:
            # One entry for each supervised token of a batch
            mark_dynamic(kwargs["output_positions"], 0)
        checkpointed = self.checkpointed and torch.is_grad_enabled()
        while True:
            function = self.functions.forward
            if checkpointed:
                function = self.functions.checkpointed_forward
            try:
                return function(self.block, x, *others, **kwargs)
            except CompileError as error:
                self.functions.replace(error, checkpointed=checkpointed)


def mark_sizes_dynamic(
    x: torch.Tensor, others: Iterable[Any], dims: tuple[int, ...] | None
) -> None:
    """Asks the compiler for one graph for all sizes of a block's input, from the start.

    Otherwise the first batch would get a graph for its own size, and with it other kernels than a
    resumed run, whose first batch is another one: their results would differ in the last bits.

    Args:
        others: further arguments of the block. Dimensions of the same size are dynamic, too.
        dims: the dimensions of `x` whose sizes change between batches. None: all but the last, and
            the length of every list of numbers, such as the bounds of segments.
    """
    changing = range(x.dim() - 1) if dims is None else dims
    sizes = {x.shape[dim] for dim in changing}
    for dim in changing:
        mark_dynamic(x, dim)
    for value in others:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if dims is None and tensor.dim() == 1:
                mark_dynamic(tensor, 0)
            for dim, size in enumerate(tensor.shape[:-1]):
                if size in sizes and size > 1:
                    mark_dynamic(tensor, dim)


def block_forward(block: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    return getattr(type(block), compiled_method(type(block)))(block, *args, **kwargs)


def checkpointed_forward(block: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    compute = getattr(type(block), compiled_method(type(block)))
    return checkpoint(
        compute, block, *args, use_reentrant=False, context_fn=keep_attention_outputs, **kwargs
    )


def recomputed(
    functions: CompiledFunctions, block: GradientCheckpointingLayer, *args: Any, **kwargs: Any
) -> Any:
    """Recomputes the compiled forward pass of a block. It launches all kernels a second time."""
    return checkpoint(functions.forward, block, *args, use_reentrant=False, **kwargs)


def keep_attention_outputs() -> tuple[Any, Any]:
    """Contexts for `checkpoint` that save attention outputs instead of recomputing them.

    They are one more tensor of the size of the block's input. Torch treats attention as random
    because of its dropout, and would save and restore the RNG state around every call, about 0.5 ms
    each.
    """
    return create_selective_checkpoint_contexts(attention_kernels())


@cache
def attention_kernels() -> list[Any]:
    """The operators that `scaled_dot_product_attention` dispatches to, and that of packed rows.

    Torch has no public list of them; `test_speed.py` checks those for CPUs and for packed rows.
    """
    names = ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
    kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    if torch.cuda.is_available():
        import_module("torch.nn.attention.varlen")  # registers the operator; takes seconds
        kernels.append(torch.ops.torch_attn._varlen_attn.default)
    return kernels
