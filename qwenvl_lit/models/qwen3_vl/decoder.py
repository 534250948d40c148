"""Decodes with a network of Qwen2.5-VL or Qwen3-VL; see `static_decoder`."""

# B rows of the cache, n rows of the batch, b rows of a prefill pass, T tokens of a padded prompt,
# D width, H heads, G heads of keys and values, K head width, M image tokens of the batch,
# L DeepStack levels

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from qwenvl_lit.models.feature_cache import FeatureCache
from qwenvl_lit.models.kv_cache import KVCache
from qwenvl_lit.models.qwen3_vl.flops import head_dim_of
from qwenvl_lit.models.qwen3_vl.tower import image_tokens, tower_inputs
from qwenvl_lit.models.static_decoder import CompiledPair, Rotary, StaticDecoder, StepInputs

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
        self.images = FeatureCache()
        self.positions: torch.Tensor | None = None  # (3, n, T) of the prompts
        self.image_positions: torch.Tensor | None = None  # (M,) into n * T, in order of the rows
        self.row_bounds: list[int] = []  # (n + 1,) cumulative numbers of image tokens of the rows
        self.levels: list[torch.Tensor] = []  # L features (M, D)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.network.model.language_model.layers

    def use_functions(self, *, compiled: bool) -> None:
        self.before_attention = CompiledPair(before_attention) if compiled else before_attention
        self.after_attention = CompiledPair(after_attention) if compiled else after_attention

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network.get_input_embeddings()(ids)

    def logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.network.lm_head(self.network.model.language_model.norm(x_BD))

    # -- prompts -----------------------------------------------------------------------------------

    def positional(
        self, inputs: Mapping[str, Any], lengths: Sequence[int], rows: int
    ) -> torch.Tensor:
        """Returns the positions of new tokens minus their slots, (B, 1).

        They differ, because a prompt has padding, and an image moves positions by less than its
        number of tokens.
        """
        n, length = inputs["input_ids"].shape
        positions = inputs.get("position_ids")
        if positions is None:
            slots = torch.arange(length, device=self.device)
            starts_n1 = length - torch.tensor(lengths, device=self.device)[:, None]
            positions = (slots - starts_n1).clamp(min=0).expand(3, -1, -1)
        self.positions = positions
        self._find_rows_of_images(inputs, n, length)
        shift = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        shift[:n] = positions[0, :, -1:] + 1 - length  # a prompt ends in text
        return shift

    def _find_rows_of_images(self, inputs: Mapping[str, Any], n: int, length: int) -> None:
        self.image_positions = inputs.get("vision_positions")
        counts = [0] * n
        if self.image_positions is not None:
            rows = self.image_positions // length
            # Synchronizes, when no work is queued yet
            counts = torch.bincount(rows, minlength=n).tolist()
        self.row_bounds = list(accumulate(counts, initial=0))

    def embed_prompts(
        self, inputs: Mapping[str, Any], image_keys: Sequence[str] | None
    ) -> torch.Tensor:
        features = inputs.get("vision_features")
        if "pixel_values" in inputs:
            features = self._encode(inputs, image_keys)
        x_nTD, self.levels = self.network.insert_images(
            self.embed(inputs["input_ids"]), features, self.image_positions
        )
        return x_nTD

    def after_block(self, index: int, x_bTD: torch.Tensor, rows: slice) -> torch.Tensor:
        """Adds the features of a DeepStack level to the image tokens of some rows."""
        if index >= len(self.levels):
            return x_bTD
        tokens = slice(self.row_bounds[rows.start], self.row_bounds[rows.stop])
        positions = self.image_positions[tokens] - rows.start * x_bTD.shape[1]
        flat = x_bTD.flatten(0, 1).index_add(0, positions, self.levels[index][tokens])
        return flat.view_as(x_bTD)

    def _encode(self, inputs: Mapping[str, Any], image_keys: Sequence[str] | None) -> torch.Tensor:
        """Returns the features (M, (1 + L) * D) of the images, encoded now or earlier."""
        config = self.network.config.vision_config
        sizes = inputs["image_sizes"]
        pixels = inputs["pixel_values"].split([height * width for height, width in sizes])

        def encode(indices: Sequence[int]) -> Iterator[torch.Tensor]:
            for some in passes(indices, sizes):
                chosen = [sizes[index] for index in some]
                arguments = tower_inputs(chosen, config)
                for name, value in arguments.items():
                    if isinstance(value, torch.Tensor):
                        arguments[name] = value.to(self.device)
                patches = torch.cat([pixels[index] for index in some])
                features = self.network.encode_images(patches, arguments)
                yield from features.split(image_tokens(chosen, config))

        return torch.cat(self.images(len(sizes), image_keys, encode))

    # -- rotary positions --------------------------------------------------------------------------

    def prompt_rotary(self, rows: slice, length: int) -> Rotary:
        return self._rotary(self.positions[:, rows])

    def step_rotary(self, step_inputs: StepInputs) -> Rotary:
        return self._rotary((step_inputs.slot + step_inputs.positional).expand(3, -1, -1))

    def _rotary(self, positions: torch.Tensor) -> Rotary:
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
