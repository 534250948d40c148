"""Decodes with a Qwen-VL network and a static KV cache.

A prefill pass writes the prompts to the cache. Every decoding step after it has a fixed shape and
is replayed as a CUDA graph.

The decoder does not use transformers' `generate`. There, as in the original Qwen-VL code, positions
include left padding, and a single alpha of dynamic NTK applies to the whole batch. The decoder
computes positions, dynamic NTK and log-n scaling separately for each row. A row of a left-padded
batch therefore has the same answer as a batch of this row only.

A slot is the index of a token in its row of the cache, including padding. A position is the index
of a token in its row without padding.
"""

# B rows of the cache, n <= B rows of the batch, b rows of a prefill pass, T tokens of a padded
# prompt, S slots that a step reads, D width, V vocabulary size, H heads, K head width, N images,
# Q tokens of an image

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from qwenvl_lit.models.dequantized import (
    DequantizedWeights,
    dequantized_bytes,
    four_bit_layers,
    free_bytes,
)
from qwenvl_lit.models.dynamo import CompileError
from qwenvl_lit.models.qwen_vl.dynamic_ntk import ntk_alpha
from qwenvl_lit.models.qwen_vl.image_cache import IMAGES_PER_PASS, ImageCache
from qwenvl_lit.models.qwen_vl.kv_cache import KVCache
from qwenvl_lit.models.qwen_vl.language import (
    LanguageBlock,
    rotary_frequencies,
    rotary_tables_at,
)
from qwenvl_lit.models.qwen_vl.running_rows import RunningRows
from qwenvl_lit.models.qwen_vl.vision import RunBlock, VisionBlock
from qwenvl_lit.models.step_graphs import CompiledPair, StepGraphs, first_line

# Most prompt tokens of a prefill pass. More tokens would take more memory and not be faster.
PROMPT_TOKENS = 16384
COMPILE_AFTER = 60  # seconds of decoding after which compile="auto" compiles
DEQUANTIZE_ROWS = 4  # least rows of a batch for which 4-bit weights are dequantized

log = logging.getLogger(__name__)


@dataclass(slots=True)
class StepInputs:
    """The inputs of a decoding step. They are written in place: graphs read fixed addresses."""

    ids: torch.Tensor  # (B,) the latest token of each row
    slot: torch.Tensor  # (1,) the slot of these tokens
    starts: torch.Tensor  # (B, 1) the slot of the first token of each row after padding
    frequencies: torch.Tensor  # (B, 1, 1, 1, K / 2) rotary frequencies of each row

    def first(self, rows: int) -> StepInputs:
        """Returns the inputs of the first rows, at the same addresses."""
        return StepInputs(self.ids[:rows], self.slot, self.starts[:rows], self.frequencies[:rows])


class Decoder:
    """The cache, the CUDA graphs and the encoded images of one `QwenVLForCausalLM`."""

    def __init__(self, network: PreTrainedModel):
        self._network = weakref.ref(network)  # see `generation.decoders`
        self.device = network.transformer.wte.weight.device
        self.cache = KVCache(network.config, self.device)
        self.images = ImageCache()
        self.dequantized: DequantizedWeights | None = None  # of the language blocks, if 4-bit
        self.answer = 0  # number of the current answer, with which `step` detects earlier ones

        self.seconds = 0.0  # time spent on earlier answers
        self.started = self.latest = 0.0  # start and latest step of the current answer

        self.step_inputs: dict[int, StepInputs] = {}  # by B
        self.requests: Counter[int] = Counter()  # number of batches of n rows, by n
        self.graphs = StepGraphs(self.device)  # by (B, slots that the step reads)
        self.can_compile = True
        self.compiled = False
        self.before_attention: Callable = LanguageBlock.before_attention
        self.after_attention: Callable = LanguageBlock.after_attention
        self.run_vision_block: RunBlock = VisionBlock.compute

    @property
    def network(self) -> PreTrainedModel:
        network = self._network()
        assert network is not None
        return network

    # -- answers -----------------------------------------------------------------------------------

    def start(
        self,
        inputs: Mapping[str, Any],
        *,
        new_tokens: int,
        image_keys: Sequence[str] | None = None,
        compiled: Literal["auto"] | bool = "auto",
    ) -> torch.Tensor:
        """Reads n left-padded prompts and returns the logits (n, V) of the first new tokens.

        Args:
            inputs: the prompts, as arguments of `QwenVLForCausalLM.forward`.
            new_tokens: the maximum number of new tokens per row.
            image_keys: the argument `keys` of `ImageCache`.
            compiled: the value of `Generation.compile`.
        """
        self.seconds += self.latest - self.started
        self.started = self.latest = perf_counter()
        self.answer += 1
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.n, length = ids.shape
        lengths = [length] * self.n
        if mask is not None:
            lengths = mask.sum(1).tolist()  # synchronizes, when no work is queued yet
        self.set_compiled(compiled)
        self.rows = self._choose_rows(self.n, length + new_tokens)
        self.filled = length
        self._reserve(self.rows, length + new_tokens)
        if self.n >= DEQUANTIZE_ROWS and self.dequantized is None:
            self._dequantize()
        self._write_step_inputs(lengths, length)
        while True:
            try:
                x_nTD = self._embed(inputs, image_keys)
                return self._prefill(x_nTD, padded=min(lengths) < length)
            except CompileError as error:  # for example, in a layer of another package
                self.stop_compiling(error)

    def step(self, ids: torch.Tensor, answer: int | None = None) -> torch.Tensor:
        """Appends the tokens `ids` (n,) to the rows and returns the next logits (n, V).

        Raises:
            ValueError: `answer` is not the number of the answer that was started last.
        """
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

    def _embed(self, inputs: Mapping[str, Any], image_keys: Sequence[str] | None) -> torch.Tensor:
        """Returns the embeddings (n, T, D) of the prompts and their images."""
        images = {}
        for name in ("vision_features", "vision_positions"):
            if name in inputs:
                images[name] = inputs[name]
        pixel_values = inputs.get("pixel_values", ())
        if len(pixel_values):
            images["vision_features"] = self.images(pixel_values, image_keys, self._encode)
        return self.network.embed(inputs["input_ids"], **images)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Only full passes are compiled. A smaller last pass would need another compilation.
        if self.compiled and len(pixel_values) == IMAGES_PER_PASS:
            return self.network.get_image_features(pixel_values, self.run_vision_block)
        return self.network.get_image_features(pixel_values)

    def encode_one(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes one image (1, 3, S, S) as (1, Q, D); with compilation, once for this shape."""
        run_block = self.run_vision_block if self.compiled else None
        return self.network.get_image_features(pixel_values, run_block)

    # -- rows that join and leave ------------------------------------------------------------------

    def running_rows(self, *, rows: int, slots: int, compiled: bool = False) -> RunningRows:
        """Returns rows for continuous batching, with a cache of their own."""
        self.set_compiled(compiled)
        return RunningRows(self, rows=rows, slots=slots)

    # -- the network -------------------------------------------------------------------------------

    def _prefill(self, x_nTD: torch.Tensor, *, padded: bool) -> torch.Tensor:
        """Writes keys and values of the prompts to the cache.

        Each pass takes as many rows as `PROMPT_TOKENS` allows. Returns the logits (n, V) of the
        last tokens.
        """
        step_inputs, cache = self.step_inputs[self.rows], self.cache.view(self.rows)
        n, length = x_nTD.shape[:2]
        rows_per_pass = max(1, PROMPT_TOKENS // length)
        last = []
        for first in range(0, n, rows_per_pass):
            rows = slice(first, min(first + rows_per_pass, n))
            x_bTD = self.read_tokens(
                x_nTD[rows],
                cache[:, :, rows],
                starts=step_inputs.starts[rows],
                frequencies=step_inputs.frequencies[rows],
                padded=padded,
            )
            last.append(x_bTD[:, -1])
        return self.head(torch.cat(last))

    def read_tokens(
        self,
        x_bTD: torch.Tensor,
        cache: torch.Tensor,
        *,
        starts: torch.Tensor,
        frequencies: torch.Tensor,
        padded: bool,
        first: int = 0,
    ) -> torch.Tensor:
        """Runs the blocks on tokens of left-padded prompts, and returns their output (b, T, D).

        Args:
            x_bTD: the embeddings of the tokens in slots `first` to `first + T - 1`.
            cache: (layers, 2, b, H, S, K). It holds the keys and values of the tokens before
                `first`. Those of the new tokens are written to it.
            starts, frequencies: as in `StepInputs`.
            padded: whether a row has padding.
        """
        end = first + x_bTD.shape[1]
        slots = torch.arange(end, device=x_bTD.device)
        new_slots = slots[first:]
        rotary = self._rotary((new_slots - starts).clamp(min=0), frequencies)
        mask = None
        if padded or first:
            mask_bTS = (new_slots[:, None] >= slots) & (slots >= starts[:, :, None])
            # Padding attends to itself: a fully masked softmax row is NaN.
            mask_bTS = mask_bTS | (new_slots[:, None] == slots)
            mask = mask_bTS[:, None]
        for block, keys_values in zip(self.network.transformer.h, cache, strict=True):
            q_bHTK, kv_2bHSK = self.before_attention(block, x_bTD, rotary)
            keys_values[:, :, :, first:end] = kv_2bHSK
            if first:
                kv_2bHSK = keys_values[:, :, :, :end]
            attended_bHTK = scaled_dot_product_attention(
                q_bHTK, *kv_2bHSK, attn_mask=mask, is_causal=mask is None
            )
            x_bTD = self.after_attention(block, x_bTD, attended_bHTK)
        return x_bTD

    def head(self, x_nD: torch.Tensor) -> torch.Tensor:
        """Returns the logits (n, V) from the output of the last block."""
        return self.network.lm_head(self.network.transformer.ln_f(x_nD))

    def compute_step(
        self, step_inputs: StepInputs, cache: torch.Tensor, slots_read: int
    ) -> torch.Tensor:
        """Runs the network on the latest token of each of B rows, and returns the logits (B, V).

        The tokens attend to the first `slots_read` slots of the cache (layers, 2, B, H, S, K).
        """
        network, slot, starts_B1 = self.network, step_inputs.slot, step_inputs.starts
        x_B1D = network.transformer.wte(step_inputs.ids)[:, None]
        slots = torch.arange(slots_read, device=self.device)
        hidden_BS = (slots < starts_B1) | (slots > slot)
        mask_BS = torch.zeros(hidden_BS.shape, dtype=cache.dtype, device=self.device)
        mask = mask_BS.masked_fill_(hidden_BS, -torch.inf)[:, None, None]
        rotary = self._rotary(slot - starts_B1, step_inputs.frequencies)
        for block, keys_values in zip(network.transformer.h, cache, strict=True):
            q_BH1K, kv_2BH1K = self.before_attention(block, x_B1D, rotary)
            keys_values.index_copy_(3, slot, kv_2BH1K)
            k_BHSK, v_BHSK = keys_values[:, :, :, :slots_read]
            attended_BH1K = scaled_dot_product_attention(q_BH1K, k_BHSK, v_BHSK, attn_mask=mask)
            x_B1D = self.after_attention(block, x_B1D, attended_BH1K)
        return self.head(x_B1D[:, 0])

    def _rotary(
        self, positions: torch.Tensor, frequencies: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.network.config
        logn_above = config.seq_length if config.use_logn_attn else None
        return rotary_tables_at(positions, frequencies, logn_above=logn_above)

    # -- graphs and compilation --------------------------------------------------------------------

    def run_step(
        self, graphs: StepGraphs, step_inputs: StepInputs, cache: torch.Tensor, slots_read: int
    ) -> torch.Tensor:
        """Runs `compute_step`, as one of `graphs` if that is faster."""
        step = partial(self.compute_step, step_inputs, cache, slots_read)
        if not graphs.help():
            return step()
        shape = (len(step_inputs.ids), slots_read)
        if shape not in graphs.captured:
            try:
                graphs.capture(shape, step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # A layer of another package may not be compilable, or may synchronize.
                if self.compiled:
                    self.stop_compiling(error)
                    return self.run_step(graphs, step_inputs, cache, slots_read)
                reason = first_line(error)
                log.warning("decoding continues without CUDA graphs, which is slower: %s", reason)
                graphs.can_capture = False
                return step()
        return graphs.replay(shape)

    def set_compiled(self, compiled: Literal["auto"] | bool) -> None:
        if compiled == "auto":
            compiled = self.compiled or (self.graphs.help() and self.seconds > COMPILE_AFTER)
        compiled = compiled and self.can_compile
        if compiled == self.compiled:
            return
        self.compiled = compiled
        self.graphs.clear()
        if compiled:
            # Blocks are compiled instead of the network, because all blocks share a compilation.
            self.before_attention = CompiledPair(LanguageBlock.before_attention)
            self.after_attention = CompiledPair(LanguageBlock.after_attention)
            self.run_vision_block = torch.compile(
                VisionBlock.compute, fullgraph=True, dynamic=False
            )
        else:
            self.before_attention = LanguageBlock.before_attention
            self.after_attention = LanguageBlock.after_attention

    def stop_compiling(self, error: RuntimeError) -> None:
        log.warning("decoding continues without compilation: %s", first_line(error))
        self.can_compile = False
        self.set_compiled(False)

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.network.transformer.wte.weight.dtype

    def _reserve(self, rows: int, slots: int) -> None:
        if not self.cache.fits(rows, slots, self.dtype):
            self.graphs.clear()
            self.cache.allocate(rows, slots, self.dtype)

    def _dequantize(self) -> None:
        """Dequantizes 4-bit weights for this and later answers, if memory allows it.

        They take at most half of the free memory: activations, graphs and images need some.
        """
        layers = four_bit_layers(self.network, self.network.transformer.h)
        size = dequantized_bytes(layers)
        if layers and 2 * size <= free_bytes(self.device):
            self.graphs.clear()
            self.dequantized = DequantizedWeights(layers)
            _log_dequantized(size)

    def _write_step_inputs(self, lengths: list[int], length: int) -> None:
        """Sets the step inputs for prompts of `lengths` tokens that are left-padded to `length`."""
        rows = self.rows
        if rows not in self.step_inputs:
            self.step_inputs[rows] = self.new_step_inputs(rows)
        step_inputs = self.step_inputs[rows]
        step_inputs.slot.fill_(length)
        step_inputs.starts.fill_(length)  # unused rows attend only to their own new tokens
        step_inputs.starts[: self.n, 0] = length - torch.tensor(lengths, device=self.device)
        unused = [1] * (rows - self.n)
        step_inputs.frequencies.copy_(self.frequencies([*lengths, *unused]))

    def new_step_inputs(self, rows: int) -> StepInputs:
        device, channels = self.device, self.network.config.kv_channels
        return StepInputs(
            ids=torch.zeros(rows, dtype=torch.int64, device=device),
            slot=torch.zeros(1, dtype=torch.int64, device=device),
            starts=torch.zeros(rows, 1, dtype=torch.int64, device=device),
            frequencies=torch.zeros(rows, 1, 1, 1, channels // 2, device=device),
        )

    def frequencies(self, lengths: Sequence[int]) -> torch.Tensor:
        """Returns `StepInputs.frequencies` for prompts of `lengths` tokens, which set the alpha."""
        config, alphas = self.network.config, [1] * len(lengths)
        if config.use_dynamic_ntk:
            alphas = [ntk_alpha(tokens, config.seq_length) for tokens in lengths]
        tables, channels = {}, config.kv_channels
        for alpha in set(alphas):
            tables[alpha] = rotary_frequencies(channels, config.rotary_emb_base, alpha, self.device)
        return torch.stack([tables[alpha] for alpha in alphas])[:, None, None, None]


@cache  # not again for each validation
def _log_dequantized(size: int) -> None:
    log.info(
        "4-bit weights of the language blocks are kept dequantized while batches are answered, "
        "which takes %.1f GiB",
        size / 2**30,
    )
