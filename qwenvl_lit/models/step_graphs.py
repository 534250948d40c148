"""CUDA graphs of decoding steps, and block functions compiled for prompts and for steps."""

# B rows, T tokens of a row, D width, V vocabulary size

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from qwenvl_lit.models.dynamo import recompilation_limits

Step = Callable[[], torch.Tensor]  # a decoding step, which returns logits (B, V)


class StepGraphs:
    """The CUDA graphs of the steps on one cache, by the shape of the step.

    Graphs read and write fixed addresses: the inputs of a step and its cache stay where they are
    until `clear` is called.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # shape -> graph of a step and the logits that it writes
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.can_capture = True

    def help(self) -> bool:
        """Returns whether CUDA graphs are possible and faster.

        Under autocast they are not faster, because a graph would replay the casts of all weights.
        """
        on_gpu = self.device.type == "cuda"
        return self.can_capture and on_gpu and not torch.is_autocast_enabled("cuda")

    def replay(self, shape: Hashable) -> torch.Tensor:
        """Replays the step of a shape that is captured, and returns its logits (B, V)."""
        graph, logits = self.captured[shape]
        graph.replay()
        return logits

    def capture(self, shape: Hashable, step: Step) -> None:
        """Captures a step.

        Raises:
            RuntimeError: a layer cannot be compiled, or synchronizes.
        """
        self.captured[shape] = self._capture(step)

    def clear(self) -> None:
        """Deletes all graphs. Call it before the cache moves."""
        self.captured.clear()

    def _capture(self, step: Step) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The first run initializes libraries. The graph overwrites what it writes.
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), None
        if self.captured:  # graphs never run concurrently, so they share a memory pool
            pool = next(iter(self.captured.values()))[0].pool()
        # "thread_local" allows other threads to pin the memory of batches during the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits = step()
        return graph, logits


class CompiledPair:
    """A function of a block, compiled separately for prompts and for steps.

    Prompts have many different lengths and share one compilation with dynamic shapes. Steps have
    few different shapes and are compiled for each batch size.
    """

    def __init__(self, function: Callable):
        self.prompts = torch.compile(function, fullgraph=True, dynamic=True)
        self.steps = torch.compile(function, fullgraph=True, dynamic=False)

    def __call__(self, block: nn.Module, x_BTD: torch.Tensor, other: Any):
        function = self.steps if x_BTD.shape[1] == 1 else self.prompts
        # The limits are above any realistic number of batch sizes.
        with recompilation_limits(per_function=256, in_total=1024):
            return function(block, x_BTD, other)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
