"""The networks of Qwen2.5-VL and Qwen3-VL: transformers' own, with another `forward`.

This `forward` computes logits at the supervised positions only, takes packed rows, and never
synchronizes. The modules and the names of the weights are those of transformers.
"""

# B batch size, T tokens, D width, V vocabulary size, S supervised positions, P patches,
# M image tokens of a batch, L DeepStack levels: features that are added after the first L blocks

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.utils import can_return_tuple

from qwenvl_lit.models.components import network_of
from qwenvl_lit.models.qwen3_vl.attention import ATTENTION, PatchEmbedding, VisionAttention
from qwenvl_lit.models.qwen3_vl.decoder import Decoder
from qwenvl_lit.models.qwen3_vl.tower import image_tokens

TOWER = "image_"  # begins the names of arguments for the vision tower, see `tower_inputs`


class VisionLanguageNetwork:
    """The methods that both networks have in place of those of transformers."""

    def __init__(self, config: PreTrainedConfig):
        if "sliding_attention" in getattr(config.text_config, "layer_types", ()):
            raise ValueError("sliding window attention is not supported; set use_sliding_window")
        config._attn_implementation = ATTENTION  # of the language model and of the vision tower
        super().__init__(config)
        tower = self.model.visual
        tower.patch_embed = PatchEmbedding(tower.patch_embed)
        for block in tower.blocks:
            block.attn = VisionAttention(block.attn)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        vision_positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Computes logits, and a loss if `labels` are given.

        Args:
            input_ids, inputs_embeds: (B, T) or (B, T, D). Exactly one of the two is given.
            attention_mask: (B, past + T), 0 for padding. It is not needed for right-padded rows.
            position_ids: (3, B, T), see `axis_positions`. By default, tokens are counted.
            past_key_values: a KV cache.
            pixel_values: (P, pixels of a patch), the patches of all images.
            vision_features: (M, (1 + L) * D) from `encode_images`, in place of `pixel_values`.
            vision_positions: (M,), flat indices into B * T of the image tokens.
            labels: (B, T), not shifted, -100 for tokens that are not supervised.
            target_positions: (S,), flat indices into B * T of the tokens whose successors are
                supervised. Only the logits (S, V) of these tokens are then computed. The loss is
                the same.
            num_items_in_batch: the divisor of the summed losses of all supervised tokens. By
                default, the loss is their mean.
            use_cache: whether to fill and return a cache. By default only in evaluation mode
                without labels, if `config.use_cache`.
            logits_to_keep: the number of logits to compute, counted from the end (0 computes all),
                or the indices of these logits.
            cu_seq_lens_q, max_length_q: the bounds (n + 1,) of the samples of a packed row, and the
                length of the longest one.
            kwargs: the result of `tower_inputs` for `pixel_values`. Other arguments are ignored.

        Raises:
            ValueError: images and positions do not match, or no token is supervised.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if pixel_values is not None and vision_features is not None:
            raise ValueError("give either pixel_values or vision_features")
        language_model = self.model.language_model
        x_BTD = language_model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packed = cu_seq_lens_q is not None
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training and labels is None
        if use_cache and past_key_values is None and not packed:
            past_key_values = DynamicCache(config=self.config.text_config)
        # Rotary tables and mask are computed before the images. Creating a mask may synchronize,
        # which costs no time as long as no work is queued on the device.
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x_BTD.shape[1], device=x_BTD.device) + past).expand(
                3, 1, -1
            )
        arguments: dict[str, Any] = {
            "position_embeddings": language_model.rotary_emb(x_BTD, position_ids),
            "attention_mask": None,
        }
        if packed:
            arguments |= {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q}
        else:
            arguments["past_key_values"] = past_key_values
            arguments["attention_mask"] = create_causal_mask(
                config=self.config.text_config,
                inputs_embeds=x_BTD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        features = vision_features
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values, kwargs)
        elif features is None and self.training and self._other_ranks_wait_for_tower():
            # Other ranks may have images. An image of one token uses every parameter.
            x_BTD = x_BTD + 0 * self._encode_blank_image().mean()
        x_BTD, levels = self.insert_images(x_BTD, features, vision_positions)
        for index, block in enumerate(language_model.layers):
            x_BTD = block(x_BTD, **arguments)
            if index < len(levels):
                x_BTD = add_at(x_BTD, vision_positions, levels[index])
        loss = None
        if labels is not None and target_positions is not None:
            if not len(target_positions):
                raise ValueError("target_positions is empty: no token of this batch is supervised")
            x_SD = x_BTD.flatten(0, 1).index_select(0, target_positions.to(x_BTD.device))
            logits = self.lm_head(language_model.norm(x_SD))
            targets = labels.flatten().index_select(0, target_positions + 1)
            loss = loss_of(logits, targets, num_items_in_batch)
        else:
            indices = logits_to_keep
            if isinstance(logits_to_keep, int):
                indices = slice(-logits_to_keep, None)
            logits = self.lm_head(language_model.norm(x_BTD[:, indices]))
            if labels is not None:
                loss = loss_of(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items_in_batch
                )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    # -- images ------------------------------------------------------------------------------------

    def insert_images(
        self, x_BTD: torch.Tensor, features: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Replaces the embeddings at flat `positions` (M,) by `features` (M, (1 + L) * D).

        Returns:
            The embeddings, and the features (M, D) of each DeepStack level.
        """
        if features is None or not len(features):
            return x_BTD, ()
        if positions is None or len(positions) != len(features):
            count = 0 if positions is None else len(positions)
            raise ValueError(f"vision_positions has {count} entries for {len(features)} features")
        # Modules may be on several devices.
        image_MD, *levels = features.to(x_BTD).split(x_BTD.shape[-1], dim=-1)
        flat = x_BTD.flatten(0, 1).index_copy(0, positions.to(x_BTD.device), image_MD)
        return flat.view_as(x_BTD), levels

    def encode_images(self, pixel_values: torch.Tensor, vision: Mapping[str, Any]) -> torch.Tensor:
        """Encodes the patches of images as features (M, (1 + L) * D).

        A frozen vision tower saves no activations, and computes in the precision of its weights
        instead of the autocast precision. Its features are therefore the same in every run, and may
        be stored.

        Args:
            vision: the result of `tower_inputs` for the images. Other entries are ignored.
        """
        tower = self.model.visual
        arguments = {}
        for name, value in vision.items():
            if name.startswith(TOWER) and name != "image_sizes":
                arguments[name.removeprefix(TOWER)] = value
        is_trained = any(tensor.requires_grad for tensor in tower.parameters())
        frozen = not (is_trained or pixel_values.requires_grad)
        device_type = pixel_values.device.type
        autocast: Any = nullcontext()
        if frozen and torch.amp.is_autocast_available(device_type):
            autocast = torch.autocast(device_type, enabled=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen), autocast:
            output = tower(pixel_values, grid_thw=None, return_dict=True, **arguments)
            levels = output.get("deepstack_features") or ()
            return torch.cat((output.pooler_output, *levels), dim=-1)

    def _other_ranks_wait_for_tower(self) -> bool:
        """Returns whether other ranks block on this rank's gradients (DDP) or shards (FSDP)."""
        return any(
            tensor.requires_grad or isinstance(tensor, DTensor)
            for tensor in self.model.visual.parameters()
        )

    def _encode_blank_image(self) -> torch.Tensor:
        """Encodes an image of one token. Its indices are all 0: the values do not matter."""
        tower = self.model.visual
        patches = tower.spatial_merge_unit
        weight = tower.patch_embed.proj.weight
        zeros = weight.new_zeros
        bounds = torch.arange(2, dtype=torch.int32, device=weight.device) * patches
        arguments: dict[str, Any] = {
            "image_position_ids": zeros(patches, 2, dtype=torch.int64),
            "image_cu_seqlens": bounds,
            "image_max_seqlen": patches,
        }
        if hasattr(tower, "window_size"):
            arguments["image_window_index"] = zeros(1, dtype=torch.int64)
            arguments["image_cu_window_seqlens"] = bounds
            arguments["image_max_window_seqlen"] = patches
        else:
            arguments["image_interp_indices"] = zeros(patches, 4, dtype=torch.int64)
            arguments["image_interp_weights"] = zeros(patches, 4)
        return self.encode_images(zeros(patches, weight[0].numel()), arguments)

    # -- generation --------------------------------------------------------------------------------

    def decoder(self) -> Decoder:
        """Returns a new decoder; see `Network.decoder`."""
        return Decoder(self)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Passes the images to the first step only, because the cache contains them afterwards."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not kwargs.get("is_first_iteration"):
            if not kwargs.get("use_cache", True) and kwargs.get("vision_features") is not None:
                raise ValueError("generate needs use_cache=True for prompts with images")
            inputs.pop("vision_features", None)
            inputs.pop("vision_positions", None)
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Lets the arguments of the tower pass, which `forward` does not list."""
        others = {}
        for name, value in model_kwargs.items():
            if not name.startswith(TOWER):
                others[name] = value
        super()._validate_model_kwargs(others)

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Encodes each image once, and repeats rows for beams and for several answers per row."""
        vision = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(TOWER)}
        pixel_values = kwargs.pop("pixel_values", None)
        features = kwargs.pop("vision_features", None)
        image_positions = kwargs.pop("vision_positions", None)
        position_ids = kwargs.pop("position_ids", None)
        length = input_ids.shape[1]
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **kwargs,
        )
        if position_ids is not None:
            kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=1)
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values, vision)
        if features is not None and len(features):
            copies = torch.arange(expand_size, device=image_positions.device)[:, None]
            rows = image_positions // length * expand_size + copies
            kwargs["vision_positions"] = (rows * length + image_positions % length).flatten()
            kwargs["vision_features"] = features.repeat(expand_size, 1)
        return ids, kwargs


class Qwen25VLNetwork(VisionLanguageNetwork, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class Qwen3VLNetwork(VisionLanguageNetwork, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, which also adds features of earlier blocks of its tower: DeepStack."""


NETWORKS: Mapping[str, type[nn.Module]] = {  # by `model_type` of config.json
    "qwen2_5_vl": Qwen25VLNetwork,
    "qwen3_vl": Qwen3VLNetwork,
}


def image_features(model: nn.Module, vision: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the features (Q, (1 + L) * D) of each image; see `Family.image_features`."""
    network = network_of(model)
    features = network.encode_images(vision["pixel_values"], vision)
    lengths = image_tokens(vision["image_sizes"], network.config.vision_config)
    return list(features.split(lengths))


def add_at(x_BTD: torch.Tensor, positions: torch.Tensor, features_MD: torch.Tensor) -> torch.Tensor:
    """Adds features to the tokens at flat `positions` (M,)."""
    positions = positions.to(x_BTD.device)
    return x_BTD.flatten(0, 1).index_add(0, positions, features_MD.to(x_BTD)).view_as(x_BTD)


def loss_of(
    logits: torch.Tensor, targets: torch.Tensor, num_items: int | torch.Tensor | None
) -> torch.Tensor:
    """Returns the summed cross entropy over `num_items`, or its mean with None."""
    targets = targets.to(logits.device)
    if num_items is None:
        return cross_entropy(logits.float(), targets)
    return cross_entropy(logits.float(), targets, reduction="sum") / num_items


# transformers looks up by the name of the class how published names of weights are converted. Those
# of Qwen3-VL are the names in the network.
register_checkpoint_conversion_mapping(
    Qwen25VLNetwork.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),
    overwrite=True,
)
