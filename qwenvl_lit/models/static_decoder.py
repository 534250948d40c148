"""Decodes with a static KV cache; each family derives a decoder for its blocks.

A prefill pass writes the prompts to the cache. Every decoding step after it has a fixed shape and
is replayed as a CUDA graph. A row of a left-padded batch has the same answer as a batch of this row
only.
"""

# B rows of the cache, n <= B rows of the batch, b rows of a prefill pass, T tokens of a padded
# prompt, D width, V vocabulary size

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from qwenvl_lit.models.dequantized import (
    DequantizedWeights,
    dequantized_bytes,
    four_bit_layers,
    free_bytes,
)
from qwenvl_lit.models.dynamo import CompileError
from qwenvl_lit.models.kv_cache import KVCache
from qwenvl_lit.models.passes import Passes, PromptInputs, ShowHeads, StepInputs
from qwenvl_lit.models.running_rows import RunningRows

# Most prompt tokens of a prefill pass. More tokens would take more memory and not be faster.
PROMPT_TOKENS = 16384
COMPILE_AFTER = 60  # seconds of decoding after which compile="auto" compiles
DEQUANTIZE_ROWS = 4  # least rows of a batch for which 4-bit weights are dequantized

log = logging.getLogger(__name__)


class StaticDecoder(Passes):
    """Answers batches with one network, and makes rows for continuous batching.

    A family derives it and defines what `Passes` leaves open.
    """

    def __init__(self, network: PreTrainedModel, cache: KVCache):
        super().__init__(network, cache)
        self.dequantized: DequantizedWeights | None = None  # of the blocks, if they are 4-bit
        self.answer = 0  # number of the current answer, with which `step` detects earlier ones

        self.seconds = 0.0  # time spent on earlier answers
        self.started = self.latest = 0.0  # start and latest step of the current answer

        self.step_inputs: dict[int, StepInputs] = {}  # by B
        self.requests: Counter[int] = Counter()  # number of batches of n rows, by n
        self.graphs = self.new_graphs()  # by (B, slots that the step reads)

    # -- answers -----------------------------------------------------------------------------------

    def start(
        self,
        inputs: Mapping[str, Any],
        *,
        new_tokens: int,
        image_keys: Sequence[str] | None = None,
        compiled: Literal["auto"] | bool = "auto",
        show_heads: ShowHeads | None = None,
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
        if compiled == "auto":
            compiled = self.compiled or (self.graphs.help() and self.seconds > COMPILE_AFTER)
        self.set_compiled(compiled)
        self.rows = self._choose_rows(self.n, length + new_tokens)
        self.filled = length
        self._reserve(self.rows, length + new_tokens)
        if self.n >= DEQUANTIZE_ROWS:
            self._dequantize()
        prompts = self.prompt_inputs(inputs, lengths)
        self._write_step_inputs(prompts, length)
        while True:
            try:
                features = self._features(inputs, image_keys)
                x_nTD = self.embed(prompts, inputs, features)
                return self._prefill(x_nTD, prompts, show_heads)
            except CompileError as error:  # for example, in a layer of another package
                self.stop_compiling(error)

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
        slots_read = self.cache.slots_to_read(self.rows, self.filled)
        cache = self.cache.view(self.rows)
        logits = self.run_step(self.graphs, step_inputs, cache, slots_read)
        step_inputs.slot += 1
        self.latest = perf_counter()
        return logits[: self.n]

    def append(self, ids: torch.Tensor, *, show_heads: ShowHeads | None = None) -> torch.Tensor:
        """Appends the tokens `ids` (n, t) in one pass; see `Decoder.append`."""
        first, count = self.filled, ids.shape[1]
        assert first + count <= self.cache.capacity(self.rows)
        step_inputs = self.step_inputs[self.rows]
        slots = torch.arange(first, first + count, device=self.device)
        new = replace(step_inputs.first(self.n), slot=slots)
        positions = pad(
            self.step_positions(new), (first, 0)
        )  # those of earlier tokens do not matter
        appended = PromptInputs(new.starts, True, positions, new.positional)
        cache = self.cache.view(self.rows)[:, :, : self.n]
        x_ntD = self.embed_tokens(ids)
        x_ntD = self.read_tokens(x_ntD, cache, appended, first=first, show_heads=show_heads)
        self.filled += count
        step_inputs.slot += count
        return self.logits(x_ntD)

    def _features(
        self, inputs: Mapping[str, Any], image_keys: Sequence[str] | None
    ) -> Sequence[torch.Tensor] | None:
        """Returns the features of each image, encoded now or earlier; None: there is nothing to
        encode."""
        count = len(self.image_tokens(inputs))
        if not count:
            return None
        return self.images(count, image_keys, partial(self.encode_images, inputs))

    def _prefill(
        self, x_nTD: torch.Tensor, prompts: PromptInputs, show_heads: ShowHeads | None
    ) -> torch.Tensor:
        """Writes keys and values of the prompts to the cache.

        Each pass takes as many rows as `PROMPT_TOKENS` allows. Returns the logits (n, V) of the
        last tokens.
        """
        cache = self.cache.view(self.rows)
        n, length = x_nTD.shape[:2]
        rows_per_pass = max(1, PROMPT_TOKENS // length)
        last = []
        for first in range(0, n, rows_per_pass):
            rows = slice(first, min(first + rows_per_pass, n))
            x_bTD = self.read_tokens(
                x_nTD[rows], cache[:, :, rows], prompts, rows=rows, show_heads=show_heads
            )
            last.append(x_bTD[:, -1])
        return self.logits(torch.cat(last))

    # -- rows that join and leave ------------------------------------------------------------------

    def running_rows(self, *, rows: int, slots: int, compiled: bool = False) -> RunningRows:
        """Returns rows for continuous batching; see `Decoder.running_rows`."""
        self.set_compiled(compiled)
        self.few_images = True
        running = RunningRows(self, rows=rows, slots=slots)
        if rows >= DEQUANTIZE_ROWS:
            self._dequantize()
        return running

    # -- memory ------------------------------------------------------------------------------------

    def _choose_rows(self, n: int, slots: int) -> int:
        """Returns B for a batch of n rows.

        The first batch of n rows, such as the last batch of a dataset, uses the graphs of a larger
        batch size if there are any. A second batch of n rows gets graphs for this batch size.
        """
        self.requests[n] += 1
        if n in self.step_inputs or self.requests[n] > 1 or not self.graphs.help():
            return n
        larger = []
        for rows in self.step_inputs:
            if rows >= n and self.cache.capacity(rows) >= slots:
                larger.append(rows)
        return min(larger, default=n)

    def _reserve(self, rows: int, slots: int) -> None:
        dtype = self.dtype
        if not self.cache.fits(rows, slots, dtype):
            self.graphs.clear()
            self.cache.allocate(rows, slots, dtype)

    def _dequantize(self) -> None:
        """Dequantizes 4-bit weights for this and later answers, if memory allows it.

        They take at most half of the free memory: activations, graphs and images need some.
        """
        if self.dequantized is not None:
            return
        layers = four_bit_layers(self.network, self.blocks)
        size = dequantized_bytes(layers)
        if layers and 2 * size <= free_bytes(self.device):
            self.clear_graphs()
            self.dequantized = DequantizedWeights(layers)
            _log_dequantized(size)

    def _write_step_inputs(self, prompts: PromptInputs, length: int) -> None:
        """Sets the step inputs for prompts that are left-padded to `length`."""
        rows = self.rows
        if rows not in self.step_inputs:
            self.step_inputs[rows] = self.new_step_inputs(rows)
        step_inputs = self.step_inputs[rows]
        step_inputs.slot.fill_(length)
        step_inputs.starts.fill_(length)  # unused rows attend only to their own new tokens
        step_inputs.starts[: self.n] = prompts.starts
        step_inputs.positional[: self.n] = prompts.positional


@cache  # not again for each validation
def _log_dequantized(size: int) -> None:
    log.info(
        "4-bit weights of the language blocks are kept dequantized while batches are answered, "
        "which takes %.1f GiB",
        size / 2**30,
    )
