"""Decodes with a network of Qwen2.5-VL or Qwen3-VL; see `static_decoder`."""

# B rows of the cache, n rows of the batch, T tokens of a padded prompt, D width, H heads, G heads
# of keys and values, K head width, M image tokens of the batch, Q tokens of an image, L DeepStack
# levels

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from qwenvl_lit.models.cuda_graphs import CompiledPair
from qwenvl_lit.models.host_copy import send
from qwenvl_lit.models.kv_cache import KVCache
from qwenvl_lit.models.passes import Rotary, StepInputs
from qwenvl_lit.models.qwen3_vl.flops import head_dim_of
from qwenvl_lit.models.qwen3_vl.tower import image_tokens, tower_inputs
from qwenvl_lit.models.static_decoder import StaticDecoder

# Most patches of a pass of the vision tower, unless one image has more
PATCHES_PER_PASS = 16384


class Decoder(StaticDecoder):
    """The cache, the CUDA graphs and the encoded images of one network."""

    def __init__(self, network: PreTrainedModel):
        text = network.config.text_config
        cache = KVCache(
            layers=text.num_hidden_layers,
            heads=text.num_key_value_heads,
            head_dim=head_dim_of(text),
            device=network.get_input_embeddings().weight.device,
        )
        super().__init__(network, cache)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.model.language_model.layers

    def use_functions(self, *, compiled: bool) -> None:
        self.before_attention = CompiledPair(before_attention) if compiled else before_attention
        self.after_attention = CompiledPair(after_attention) if compiled else after_attention

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network.get_input_embeddings()(ids)

    def logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.network.lm_head(self.network.model.language_model.norm(x_BD))

    # -- prompts -----------------------------------------------------------------------------------

    def image_tokens(self, inputs: Mapping[str, Any]) -> Sequence[int]:
        if "pixel_values" not in inputs:
            return []
        return image_tokens(inputs["image_sizes"], self.network.config.vision_config)

    def encode_images(
        self, inputs: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        config = self.network.config.vision_config
        sizes = inputs["image_sizes"]
        pixels = inputs["pixel_values"].split([height * width for height, width in sizes])
        for some in passes(indices, sizes):
            chosen = [sizes[index] for index in some]
            arguments = tower_inputs(chosen, config)
            for name, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    arguments[name] = send(value, self.device)
            patches = torch.cat([pixels[index] for index in some])
            features = self.network.encode_images(patches, arguments)
            yield from features.split(image_tokens(chosen, config))

    def embed_prompts(
        self, inputs: Mapping[str, Any], features: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        features_MD = inputs.get("vision_features")  # or, with DeepStack, (M, (1 + L) * D)
        if features is not None:
            features_MD = torch.cat(list(features))
        x_nTD = self.embed_tokens(inputs["input_ids"])
        return self.network.insert_images(x_nTD, features_MD, inputs.get("vision_positions"))

    # -- rotary positions --------------------------------------------------------------------------

    def positions(self, inputs: Mapping[str, Any], starts_n1: torch.Tensor) -> torch.Tensor:
        positions = inputs.get("position_ids")
        if positions is None:
            slots = torch.arange(inputs["input_ids"].shape[1], device=self.device)
            positions = (slots - starts_n1).clamp(min=0).expand(3, -1, -1)
        return positions

    def positional(
        self, positions: torch.Tensor, starts_n1: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Returns the position of the first new token minus the number of tokens before, (n, 1).

        An image moves positions by less than its number of tokens.
        """
        tokens_n1 = positions.shape[-1] - starts_n1
        return positions[0, :, -1:] + 1 - tokens_n1  # a prompt ends in text

    def step_positions(self, step_inputs: StepInputs) -> torch.Tensor:
        positions = super().step_positions(step_inputs) + step_inputs.positional
        return positions.expand(3, -1, -1)

    def rotary(self, positions: torch.Tensor, positional: torch.Tensor) -> Rotary:
        language_model = self.network.model.language_model
        return language_model.rotary_emb(language_model.embed_tokens.weight, positions)


def passes(indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Yields the indices of images in groups of at most `PATCHES_PER_PASS` patches."""
    group: list[int] = []
    patches = 0
    for index in indices:
        height, width = sizes[index]
        if group and patches + height * width > PATCHES_PER_PASS:
            yield group
            group, patches = [], 0
        group.append(index)
        patches += height * width
    if group:
        yield group


def before_attention(
    block: nn.Module, x_BTD: torch.Tensor, rotary: Rotary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes a block of the language model up to its attention.

    Returns:
        The queries (B, H, T, K), and the keys and values (2, B, G, T, K).
    """
    attention = block.self_attn
    x_BTD = block.input_layernorm(x_BTD)
    q_BTHK = attention.q_proj(x_BTD).unflatten(-1, (-1, attention.head_dim))
    k_BTGK = attention.k_proj(x_BTD).unflatten(-1, (-1, attention.head_dim))
    v_BTGK = attention.v_proj(x_BTD).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):  # Qwen3-VL
        q_BTHK, k_BTGK = attention.q_norm(q_BTHK), attention.k_norm(k_BTGK)
    q_BHTK, k_BGTK = apply_rotary_pos_emb(q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), *rotary)
    # With autocast, the rotary tables are float32, and so are the rotated heads.
    dtype = v_BTGK.dtype
    return q_BHTK.to(dtype), torch.stack((k_BGTK.to(dtype), v_BTGK.transpose(1, 2)))


def after_attention(
    block: nn.Module, x_BTD: torch.Tensor, attended_BHTK: torch.Tensor
) -> torch.Tensor:
    """Computes a block after its attention. `x_BTD` is the input of `before_attention`."""
    x_BTD = x_BTD + block.self_attn.o_proj(attended_BHTK.transpose(1, 2).flatten(2))
    return x_BTD + block.mlp(block.post_attention_layernorm(x_BTD))
