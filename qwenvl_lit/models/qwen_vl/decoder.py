"""Decodes with a Qwen-VL network; see `static_decoder`.

The decoder does not use transformers' `generate`. There, as in the original Qwen-VL code, positions
include left padding, and a single alpha of dynamic NTK applies to the whole batch. The decoder
computes positions, dynamic NTK and log-n scaling separately for each row.
"""

# B rows of the cache, n rows of the batch, T tokens of a padded prompt, D width, V vocabulary size,
# K head width, N images, Q tokens of an image

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qwenvl_lit.models.cuda_graphs import CompiledPair
from qwenvl_lit.models.kv_cache import KVCache
from qwenvl_lit.models.passes import FEW_IMAGES, Rotary
from qwenvl_lit.models.qwen_vl.dynamic_ntk import ntk_alpha
from qwenvl_lit.models.qwen_vl.language import (
    LanguageBlock,
    rotary_frequencies,
    rotary_tables_at,
)
from qwenvl_lit.models.qwen_vl.vision import RunBlock, VisionBlock
from qwenvl_lit.models.static_decoder import StaticDecoder

IMAGES_PER_PASS = 32  # most images that are encoded as one pass


class Decoder(StaticDecoder):
    """The cache, the CUDA graphs and the encoded images of one `QwenVLForCausalLM`."""

    def __init__(self, network: PreTrainedModel):
        config = network.config
        cache = KVCache(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            head_dim=config.kv_channels,
            device=network.transformer.wte.weight.device,
        )
        super().__init__(network, cache)
        self.image_graphs = self.new_graphs()  # by the shape of the pixels
        self.graph_pixels: dict[torch.Size, torch.Tensor] = {}  # which these graphs read

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.transformer.h

    def use_functions(self, *, compiled: bool) -> None:
        self.before_attention: Callable = LanguageBlock.before_attention
        self.after_attention: Callable = LanguageBlock.after_attention
        self.run_vision_block: RunBlock = VisionBlock.compute
        if compiled:
            # Blocks are compiled instead of the network, because all blocks share a compilation.
            self.before_attention = CompiledPair(LanguageBlock.before_attention)
            self.after_attention = CompiledPair(LanguageBlock.after_attention)
            self.run_vision_block = torch.compile(
                VisionBlock.compute, fullgraph=True, dynamic=False
            )

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network.transformer.wte(ids)

    def logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.network.lm_head(self.network.transformer.ln_f(x_BD))

    # -- prompts -----------------------------------------------------------------------------------

    def image_tokens(self, inputs: Mapping[str, Any]) -> Sequence[int]:
        return [self.network.config.n_queries] * len(inputs.get("pixel_values", ()))

    def encode_images(
        self, inputs: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        pixel_values = inputs["pixel_values"]
        for first in range(0, len(indices), IMAGES_PER_PASS):
            images = [pixel_values[index] for index in indices[first : first + IMAGES_PER_PASS]]
            pixels = torch.stack(images)
            if self.few_images and len(images) in FEW_IMAGES:
                yield from self._encode_graphed(pixels)
            else:
                # Any other number of images, as in a last pass, would need another compilation.
                yield from self._encode(pixels, compiled=len(images) == IMAGES_PER_PASS)

    def _encode(self, pixels: torch.Tensor, *, compiled: bool) -> torch.Tensor:
        run_block = self.run_vision_block if compiled and self.compiled else None
        return self.network.get_image_features(pixels, run_block)

    def _encode_graphed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes images as a CUDA graph, if that is faster."""
        shape = pixels.shape
        if shape not in self.graph_pixels:
            self.graph_pixels[shape] = torch.empty_like(pixels)
        self.graph_pixels[shape].copy_(pixels)
        encode = partial(self._encode, self.graph_pixels[shape], compiled=True)
        return self.run_graphed(self.image_graphs, shape, encode).clone()

    def embed_prompts(
        self, inputs: Mapping[str, Any], features: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        features_NQD = inputs.get("vision_features")
        if features is not None:
            features_NQD = torch.stack(list(features))
        x_nTD = self.network.embed(
            inputs["input_ids"],
            vision_features=features_NQD,
            vision_positions=inputs.get("vision_positions"),
        )
        return x_nTD, ()

    # -- rotary positions --------------------------------------------------------------------------

    def positions(self, inputs: Mapping[str, Any], starts_n1: torch.Tensor) -> torch.Tensor:
        slots = torch.arange(inputs["input_ids"].shape[1], device=self.device)
        return (slots - starts_n1).clamp(min=0)

    def positional(
        self, positions: torch.Tensor, starts_n1: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Returns the rotary frequencies of each row, (n, 1, 1, 1, K / 2)."""
        config, alphas = self.network.config, [1] * len(lengths)
        if config.use_dynamic_ntk:
            alphas = [ntk_alpha(tokens, config.seq_length) for tokens in lengths]
        tables, channels = {}, config.kv_channels
        for alpha in set(alphas):
            tables[alpha] = rotary_frequencies(channels, config.rotary_emb_base, alpha, self.device)
        return torch.stack([tables[alpha] for alpha in alphas])[:, None, None, None]

    def rotary(self, positions: torch.Tensor, positional: torch.Tensor) -> Rotary:
        config = self.network.config
        logn_above = config.seq_length if config.use_logn_attn else None
        return rotary_tables_at(positions, positional, logn_above=logn_above)
