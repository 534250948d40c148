"""Forward passes of a Qwen-VL network over prompts and steps, with keys and values in a cache."""

# B rows of a step, b rows of a prefill pass, n rows of a batch, T tokens of a padded prompt,
# S slots of the cache, D width, V vocabulary size, H heads, K head width, N images, Q tokens of an
# image

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from qwenvl_lit.models.qwen_vl.dynamic_ntk import ntk_alpha
from qwenvl_lit.models.qwen_vl.image_cache import IMAGES_PER_PASS, ImageCache
from qwenvl_lit.models.qwen_vl.language import (
    LanguageBlock,
    rotary_frequencies,
    rotary_tables_at,
)
from qwenvl_lit.models.qwen_vl.vision import RunBlock, VisionBlock
from qwenvl_lit.models.step_graphs import CompiledPair, StepGraphs, first_line

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


class Passes:
    """Computes prompts and steps, compiled or not, and keeps encoded images."""

    def __init__(self, network: PreTrainedModel):
        self._network = weakref.ref(network)  # see `generation.decoders`
        self.device = network.transformer.wte.weight.device
        self.images = ImageCache()
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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.network.transformer.wte.weight.dtype

    def embed(self, inputs: Mapping[str, Any], image_keys: Sequence[str] | None) -> torch.Tensor:
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

    def encode_few(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes images (N, 3, S, S) as (N, Q, D). Each N is compiled."""
        run_block = self.run_vision_block if self.compiled else None
        return self.network.get_image_features(pixel_values, run_block)

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

    def set_compiled(self, compiled: bool) -> bool:
        """Compiles the blocks, or ceases to; returns whether this is a change."""
        compiled = compiled and self.can_compile
        if compiled == self.compiled:
            return False
        self.compiled = compiled
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
        return True

    def stop_compiling(self, error: RuntimeError) -> None:
        log.warning("decoding continues without compilation: %s", first_line(error))
        self.can_compile = False
        self.set_compiled(False)

    # -- step inputs -------------------------------------------------------------------------------

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
