"""Decodes with a static KV cache; each family derives a decoder for its blocks.

A prefill pass writes the prompts to the cache. Every decoding step after it has a fixed shape and
is replayed as a CUDA graph. A row of a left-padded batch has the same answer as a batch of this row
only.

A slot is the index of a token in its row of the cache, including padding. A position is what rotary
tables are computed from; a family counts it without padding.
"""

# B rows of the cache, n <= B rows of the batch, b rows of a prefill pass, T tokens of a padded
# prompt, S slots that a step reads, D width, V vocabulary size, H heads, G heads of keys and
# values, K head width

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from qwenvl_lit.models.dynamo import CompileError, recompilation_limits
from qwenvl_lit.models.kv_cache import KVCache

# Most prompt tokens of a prefill pass. More tokens would take more memory and not be faster.
PROMPT_TOKENS = 16384
COMPILE_AFTER = 60  # seconds of decoding after which compile="auto" compiles

log = logging.getLogger(__name__)

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


@dataclass(slots=True)
class StepInputs:
    """The inputs of a decoding step. They are written in place: graphs read fixed addresses."""

    ids: torch.Tensor  # (B,) the latest token of each row
    slot: torch.Tensor  # (1,) the slot of these tokens
    starts: torch.Tensor  # (B, 1) the slot of the first token of each row after padding
    positional: torch.Tensor  # (B, ...) what the family computes rotary tables of each row from


class StaticDecoder(ABC):
    """The cache and the CUDA graphs of one network."""

    def __init__(self, network: PreTrainedModel, cache: KVCache):
        self._network = weakref.ref(network)  # see `generation.decoders`
        self.cache = cache
        self.device = cache.device
        self.answer = 0  # number of the current answer, with which `step` detects earlier ones

        self.seconds = 0.0  # time spent on earlier answers
        self.started = self.latest = 0.0  # start and latest step of the current answer

        self.step_inputs: dict[int, StepInputs] = {}  # by B
        self.requests: Counter[int] = Counter()  # number of batches of n rows, by n
        # (B, slots that the step reads) -> graph of a step and the logits that it writes
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.can_capture = True
        self.can_compile = True
        self.compiled = False
        self.use_functions(compiled=False)

    @property
    def network(self) -> PreTrainedModel:
        network = self._network()
        assert network is not None
        return network

    # -- what a family defines ---------------------------------------------------------------------

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the language model."""

    # Computes a block up to its attention: (block, (B, T, D), rotary tables) -> queries
    # (B, H, T, K), keys and values (2, B, G, T, K)
    before_attention: Callable[[nn.Module, torch.Tensor, Rotary], tuple[torch.Tensor, torch.Tensor]]
    # Computes a block after its attention: (block, its input (B, T, D), attended (B, H, T, K)) ->
    # its output
    after_attention: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

    @abstractmethod
    def use_functions(self, *, compiled: bool) -> None:
        """Sets `before_attention` and `after_attention`, and other functions to compile."""

    @abstractmethod
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeds ids as (..., D)."""

    @abstractmethod
    def logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, V) of outputs of the last block."""

    @abstractmethod
    def embed_prompts(
        self, inputs: Mapping[str, Any], image_keys: Sequence[str] | None
    ) -> torch.Tensor:
        """Returns the embeddings (n, T, D) of the prompts and their images."""

    @abstractmethod
    def positional(
        self, inputs: Mapping[str, Any], lengths: Sequence[int], rows: int
    ) -> torch.Tensor:
        """Returns the value (B, ...) of `StepInputs.positional` for prompts of `lengths` tokens."""

    @abstractmethod
    def prompt_rotary(self, rows: slice, length: int) -> Rotary:
        """Returns the rotary tables of the prompts of some rows, padded to `length`."""

    @abstractmethod
    def step_rotary(self, step_inputs: StepInputs) -> Rotary:
        """Returns the rotary tables of a step."""

    def after_block(self, index: int, x_bTD: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns the input of block `index` + 1 for the prompts of some rows."""
        return x_bTD

    # -- answers -----------------------------------------------------------------------------------

    def start(
        self,
        inputs: Mapping[str, Any],
        *,
        new_tokens: int,
        image_keys: Sequence[str] | None = None,
        compiled: Literal["auto"] | bool = "auto",
    ) -> torch.Tensor:
        """Reads n left-padded prompts and returns the logits (n, V); see `Decoder.start`."""
        self.seconds += self.latest - self.started
        self.started = self.latest = perf_counter()
        self.answer += 1
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.n, length = ids.shape
        lengths = [length] * self.n
        if mask is not None:
            lengths = mask.sum(1).tolist()  # synchronizes, when no work is queued yet
        self._set_compiled(compiled)
        self.rows = self._choose_rows(self.n, length + new_tokens)
        self.filled = length
        self._reserve(self.rows, length + new_tokens)
        self._write_step_inputs(inputs, lengths, length)
        while True:
            try:
                x_nTD = self.embed_prompts(inputs, image_keys)
                return self._prefill(x_nTD, padded=min(lengths) < length)
            except CompileError as error:  # for example, in a layer of another package
                self._stop_compiling(error)

    def step(self, ids: torch.Tensor, answer: int | None = None) -> torch.Tensor:
        """Appends the tokens `ids` (n,) and returns the next logits (n, V); see `Decoder.step`."""
        if answer not in (None, self.answer):
            raise ValueError(
                "another answer of this model was begun before this one ended; "
                "read each answer to its end before the next one, or load the model twice"
            )
        step_inputs = self.step_inputs[self.rows]
        step_inputs.ids[: self.n] = ids
        self.filled += 1
        logits = self._replay(self.rows, self.cache.slots_to_read(self.rows, self.filled))
        step_inputs.slot += 1
        self.latest = perf_counter()
        return logits[: self.n]

    # -- the network -------------------------------------------------------------------------------

    def _prefill(self, x_nTD: torch.Tensor, *, padded: bool) -> torch.Tensor:
        """Writes keys and values of the prompts to the cache.

        Each pass takes as many rows as `PROMPT_TOKENS` allows. Returns the logits (n, V) of the
        last tokens.
        """
        cache, starts = self.cache.view(self.rows), self.step_inputs[self.rows].starts
        n, length = x_nTD.shape[:2]
        rows_per_pass = max(1, PROMPT_TOKENS // length)
        last = []
        for first in range(0, n, rows_per_pass):
            rows = slice(first, min(first + rows_per_pass, n))
            rotary = self.prompt_rotary(rows, length)
            mask = prompt_mask(starts[rows], length) if padded else None
            x_bTD = x_nTD[rows]
            for index, (block, keys_values) in enumerate(zip(self.blocks, cache, strict=True)):
                q_bHTK, kv_2bGTK = self.before_attention(block, x_bTD, rotary)
                keys_values[:, rows, :, :length] = kv_2bGTK
                attended_bHTK = attend_to_prompt(q_bHTK, *kv_2bGTK, mask)
                x_bTD = self.after_attention(block, x_bTD, attended_bHTK)
                x_bTD = self.after_block(index, x_bTD, rows)
            last.append(x_bTD[:, -1])
        return self.logits(torch.cat(last))

    def _step(self, rows: int, slots_read: int) -> torch.Tensor:
        """Runs the network on the latest token of each of B rows, and returns the logits (B, V).

        The tokens attend to the first `slots_read` slots of the cache.
        """
        step_inputs = self.step_inputs[rows]
        slot, starts_B1, cache = step_inputs.slot, step_inputs.starts, self.cache.view(rows)
        x_B1D = self.embed(step_inputs.ids)[:, None]
        slots = torch.arange(slots_read, device=self.device)
        hidden_BS = (slots < starts_B1) | (slots > slot)
        mask_BS = torch.zeros(hidden_BS.shape, dtype=cache.dtype, device=self.device)
        mask = mask_BS.masked_fill_(hidden_BS, -torch.inf)[:, None, None]
        rotary = self.step_rotary(step_inputs)
        for block, keys_values in zip(self.blocks, cache, strict=True):
            q_BH1K, kv_2BG1K = self.before_attention(block, x_B1D, rotary)
            keys_values.index_copy_(3, slot, kv_2BG1K)
            k_BGSK, v_BGSK = keys_values[:, :, :, :slots_read]
            # The heads that share keys are attended as if they were tokens of one head: the keys
            # need no copy for each of them.
            q_BGXK = q_BH1K.unflatten(1, (k_BGSK.shape[1], -1)).flatten(2, 3)
            attended_BGXK = scaled_dot_product_attention(q_BGXK, k_BGSK, v_BGSK, attn_mask=mask)
            attended_BH1K = attended_BGXK.reshape(q_BH1K.shape)
            x_B1D = self.after_attention(block, x_B1D, attended_BH1K)
        return self.logits(x_B1D[:, 0])

    # -- graphs and compilation --------------------------------------------------------------------

    def _replay(self, rows: int, slots_read: int) -> torch.Tensor:
        """Runs `_step`, as a CUDA graph if that is faster."""
        if not self._graphs_help():
            return self._step(rows, slots_read)
        if (rows, slots_read) not in self.graphs:
            try:
                self.graphs[rows, slots_read] = self._capture(rows, slots_read)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # A layer of another package may not be compilable, or may synchronize.
                if self.compiled:
                    self._stop_compiling(error)
                    return self._replay(rows, slots_read)
                reason = _first_line(error)
                log.warning("decoding continues without CUDA graphs, which is slower: %s", reason)
                self.can_capture = False
                return self._step(rows, slots_read)
        graph, logits = self.graphs[rows, slots_read]
        graph.replay()
        return logits

    def _graphs_help(self) -> bool:
        """Returns whether CUDA graphs are possible and faster.

        Under autocast they are not faster, because a graph would replay the casts of all weights.
        """
        on_gpu = self.device.type == "cuda"
        return self.can_capture and on_gpu and not torch.is_autocast_enabled("cuda")

    def _capture(self, rows: int, slots_read: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The first run initializes libraries. The graph overwrites what it writes.
            self._step(rows, slots_read)
        torch.cuda.current_stream().wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), None
        if self.graphs:  # graphs never run concurrently, so they share a memory pool
            pool = next(iter(self.graphs.values()))[0].pool()
        # "thread_local" allows other threads to pin the memory of batches during the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits = self._step(rows, slots_read)
        return graph, logits

    def _set_compiled(self, compiled: Literal["auto"] | bool) -> None:
        if compiled == "auto":
            compiled = self.compiled or (self._graphs_help() and self.seconds > COMPILE_AFTER)
        compiled = compiled and self.can_compile
        if compiled == self.compiled:
            return
        self.compiled = compiled
        self.graphs.clear()
        self.use_functions(compiled=compiled)

    def _stop_compiling(self, error: RuntimeError) -> None:
        log.warning("decoding continues without compilation: %s", _first_line(error))
        self.can_compile = False
        self._set_compiled(False)

    # -- memory ------------------------------------------------------------------------------------

    def _choose_rows(self, n: int, slots: int) -> int:
        """Returns B for a batch of n rows.

        The first batch of n rows, such as the last batch of a dataset, uses the graphs of a larger
        batch size if there are any. A second batch of n rows gets graphs for this batch size.
        """
        self.requests[n] += 1
        if n in self.step_inputs or self.requests[n] > 1 or not self._graphs_help():
            return n
        larger = []
        for rows in self.step_inputs:
            if rows >= n and self.cache.capacity(rows) >= slots:
                larger.append(rows)
        return min(larger, default=n)

    def _reserve(self, rows: int, slots: int) -> None:
        dtype = self.network.get_input_embeddings().weight.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        if not self.cache.fits(rows, slots, dtype):
            self.graphs.clear()
            self.cache.allocate(rows, slots, dtype)

    def _write_step_inputs(
        self, inputs: Mapping[str, Any], lengths: Sequence[int], length: int
    ) -> None:
        """Sets the step inputs for prompts of `lengths` tokens that are left-padded to `length`."""
        rows, device = self.rows, self.device
        positional = self.positional(inputs, lengths, rows)
        if rows not in self.step_inputs:
            self.step_inputs[rows] = StepInputs(
                ids=torch.zeros(rows, dtype=torch.int64, device=device),
                slot=torch.zeros(1, dtype=torch.int64, device=device),
                starts=torch.zeros(rows, 1, dtype=torch.int64, device=device),
                positional=torch.zeros_like(positional),
            )
        step_inputs = self.step_inputs[rows]
        step_inputs.slot.fill_(length)
        step_inputs.starts.fill_(length)  # unused rows attend only to their own new tokens
        step_inputs.starts[: self.n, 0] = length - torch.tensor(lengths, device=device)
        step_inputs.positional.copy_(positional)


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


def prompt_mask(starts_b1: torch.Tensor, length: int) -> torch.Tensor:
    """Returns which tokens of left-padded prompts attend to which, (b, 1, T, T)."""
    slots = torch.arange(length, device=starts_b1.device)
    mask_bTT = (slots[:, None] >= slots) & (slots >= starts_b1[:, :, None])
    # Padding attends to itself: a fully masked softmax row is NaN.
    return (mask_bTT | (slots[:, None] == slots))[:, None]


def attend_to_prompt(
    q_bHTK: torch.Tensor, k_bGTK: torch.Tensor, v_bGTK: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Computes attention with a mask, or causal attention."""
    groups = q_bHTK.shape[1] // k_bGTK.shape[1]
    if mask is not None and groups > 1:
        # Kernels that take masks have no grouped heads.
        k_bGTK, v_bGTK = (x.repeat_interleave(groups, dim=1) for x in (k_bGTK, v_bGTK))
    return scaled_dot_product_attention(
        q_bHTK,
        k_bGTK,
        v_bGTK,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_bHTK.shape[1] != k_bGTK.shape[1],
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
