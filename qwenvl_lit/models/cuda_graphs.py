"""CUDA graphs of decoding steps and images, and block functions compiled for prompts and steps."""

# B rows, T tokens of a row, D width

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

Function = Callable[[], torch.Tensor]  # reads and writes fixed addresses


class CUDAGraphs:
    """CUDA graphs of one function, such as the steps on one cache, by the shape of its inputs.

    Graphs read and write fixed addresses: the inputs of a step and its cache stay where they are
    until `clear` is called.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # shape -> graph and the tensor that it writes
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.can_capture = True

    def help(self) -> bool:
        """Returns whether CUDA graphs are possible and faster.

        Under autocast they are not faster, because a graph would replay the casts of all weights.
        """
        on_gpu = self.device.type == "cuda"
        return self.can_capture and on_gpu and not torch.is_autocast_enabled("cuda")

    def replay(self, shape: Hashable) -> torch.Tensor:
        """Replays the graph of a shape that is captured, and returns what it writes.

        The values are valid until any of these graphs is replayed.
        """
        graph, output = self.captured[shape]
        graph.replay()
        return output

    def capture(self, shape: Hashable, function: Function) -> None:
        """Captures a graph of what the function does.

        Raises:
            RuntimeError: a layer cannot be compiled, or synchronizes.
        """
        self.captured[shape] = self._capture(function)

    def clear(self) -> None:
        """Deletes all graphs. Call it before the cache moves."""
        self.captured.clear()

    def _capture(self, function: Function) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The first run initializes libraries. The graph overwrites what it writes.
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), None
        if self.captured:  # graphs never run concurrently, so they share a memory pool
            pool = next(iter(self.captured.values()))[0].pool()
        # "thread_local" allows other threads to pin the memory of batches during the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = function()
        return graph, output


class CompiledPair:
    """A function of a block, compiled separately for prompts and for steps.

    Prompts have many different lengths and share one compilation with dynamic shapes. Steps have
    few different shapes and are compiled for each batch size. Call it within
    `recompilation_limits`: there are many shapes.
    """

    def __init__(self, function: Callable):
        self.prompts = torch.compile(function, fullgraph=True, dynamic=True)
        self.steps = torch.compile(function, fullgraph=True, dynamic=False)

    def __call__(self, block: nn.Module, x_BTD: torch.Tensor, other: Any):
        function = self.steps if x_BTD.shape[1] == 1 else self.prompts
        return function(block, x_BTD, other)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
