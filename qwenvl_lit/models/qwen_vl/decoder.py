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
        self._set_compiled(compiled)
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
                self._stop_compiling(error)

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
        logits = self._replay(self.rows, self.cache.slots_to_read(self.rows, self.filled))
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

    # -- the network -------------------------------------------------------------------------------

    def _prefill(self, x_nTD: torch.Tensor, *, padded: bool) -> torch.Tensor:
        """Writes keys and values of the prompts to the cache.

        Each pass takes as many rows as `PROMPT_TOKENS` allows. Returns the logits (n, V) of the
        last tokens.
        """
        network, step_inputs = self.network, self.step_inputs[self.rows]
        cache = self.cache.view(self.rows)
        n, length = x_nTD.shape[:2]
        rows_per_pass = max(1, PROMPT_TOKENS // length)
        last = []
        slots = torch.arange(length, device=x_nTD.device)
        for first in range(0, n, rows_per_pass):
            rows = slice(first, min(first + rows_per_pass, n))
            starts_b1 = step_inputs.starts[rows]
            rotary = self._rotary((slots - starts_b1).clamp(min=0), step_inputs.frequencies[rows])
            mask = None
            if padded:
                mask_bTT = (slots[:, None] >= slots) & (slots >= starts_b1[:, :, None])
                # Padding attends to itself: a fully masked softmax row is NaN.
                mask_bTT = mask_bTT | (slots[:, None] == slots)
                mask = mask_bTT[:, None]
            x_bTD = x_nTD[rows]
            for block, keys_values in zip(network.transformer.h, cache, strict=True):
                q_bHTK, kv_2bHTK = self.before_attention(block, x_bTD, rotary)
                keys_values[:, rows, :, :length] = kv_2bHTK
                attended_bHTK = scaled_dot_product_attention(
                    q_bHTK, *kv_2bHTK, attn_mask=mask, is_causal=mask is None
                )
                x_bTD = self.after_attention(block, x_bTD, attended_bHTK)
            last.append(x_bTD[:, -1])
        return network.lm_head(network.transformer.ln_f(torch.cat(last)))

    def _step(self, rows: int, slots_read: int) -> torch.Tensor:
        """Runs the network on the latest token of each of B rows, and returns the logits (B, V).

        The tokens attend to the first `slots_read` slots of the cache.
        """
        network, step_inputs = self.network, self.step_inputs[rows]
        slot, starts_B1, cache = step_inputs.slot, step_inputs.starts, self.cache.view(rows)
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
        return network.lm_head(network.transformer.ln_f(x_B1D[:, 0]))

    def _rotary(
        self, positions: torch.Tensor, frequencies: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.network.config
        logn_above = config.seq_length if config.use_logn_attn else None
        return rotary_tables_at(positions, frequencies, logn_above=logn_above)

    # -- graphs and compilation --------------------------------------------------------------------

    def _replay(self, rows: int, slots_read: int) -> torch.Tensor:
        """Runs `_step`, as a CUDA graph if that is faster."""
        step = partial(self._step, rows, slots_read)
        if not self.graphs.help():
            return step()
        if (rows, slots_read) not in self.graphs.captured:
            try:
                self.graphs.capture((rows, slots_read), step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # A layer of another package may not be compilable, or may synchronize.
                if self.compiled:
                    self._stop_compiling(error)
                    return self._replay(rows, slots_read)
                reason = first_line(error)
                log.warning("decoding continues without CUDA graphs, which is slower: %s", reason)
                self.graphs.can_capture = False
                return step()
        return self.graphs.replay((rows, slots_read))

    def _set_compiled(self, compiled: Literal["auto"] | bool) -> None:
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

    def _stop_compiling(self, error: RuntimeError) -> None:
        log.warning("decoding continues without compilation: %s", first_line(error))
        self.can_compile = False
        self._set_compiled(False)

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
        dtype = self.network.transformer.wte.weight.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        if not self.cache.fits(rows, slots, dtype):
            self.graphs.clear()
            self.cache.allocate(rows, slots, dtype)

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
        config, rows, device = self.network.config, self.rows, self.device
        channels = config.kv_channels
        if rows not in self.step_inputs:
            self.step_inputs[rows] = StepInputs(
                ids=torch.zeros(rows, dtype=torch.int64, device=device),
                slot=torch.zeros(1, dtype=torch.int64, device=device),
                starts=torch.zeros(rows, 1, dtype=torch.int64, device=device),
                frequencies=torch.zeros(rows, 1, 1, 1, channels // 2, device=device),
            )
        step_inputs = self.step_inputs[rows]
        step_inputs.slot.fill_(length)
        step_inputs.starts.fill_(length)  # unused rows attend only to their own new tokens
        step_inputs.starts[: self.n, 0] = length - torch.tensor(lengths, device=device)
        alphas = [1] * rows
        if config.use_dynamic_ntk:
            alphas[: self.n] = [ntk_alpha(tokens, config.seq_length) for tokens in lengths]
        tables = {}
        for alpha in set(alphas):
            tables[alpha] = rotary_frequencies(channels, config.rotary_emb_base, alpha, device)
        frequencies = torch.stack([tables[alpha] for alpha in alphas])
        step_inputs.frequencies.copy_(frequencies[:, None, None, None])


@cache  # not again for each validation
def _log_dequantized(size: int) -> None:
    log.info(
        "4-bit weights of the language blocks are kept dequantized while batches are answered, "
        "which takes %.1f GiB",
        size / 2**30,
    )
