"""Qwen-VL as a transformers model: a language model that reads images.

Weights are saved under their original names, in the layout of the published files.
"""

# B rows, T tokens, D width, V vocabulary, N images, Q tokens of an image, S side in pixels,
# M = N * Q, K width of an attention head

from __future__ import annotations

import re
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.dynamic_ntk import alpha_after, forget_alpha
from qwenvl_lit.models.qwen_vl.image_tokens import (
    find_image_tokens,
    repeat_positions,
    write_image_tokens,
)
from qwenvl_lit.models.qwen_vl.initialization import initialize
from qwenvl_lit.models.qwen_vl.language import (
    Attention,
    LanguageBlock,
    RMSNorm,
    has_segments_kernel,
    rotary_tables,
)
from qwenvl_lit.models.qwen_vl.vision import RunBlock, VisionTower, no_autocast

IMAGES = ("pixel_values", "vision_positions", "vision_features")  # arguments of `forward`


class QwenVLPreTrainedModel(PreTrainedModel):
    """Declares to transformers what the network supports, and initializes its weights.

    The attributes and methods with an underscore are those that transformers asks its models for.
    """

    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules: ClassVar = ["LanguageBlock", "VisionBlock", "Resampler"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _can_record_outputs: ClassVar = {"hidden_states": LanguageBlock, "attentions": Attention}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _initialize_weights(self, module: nn.Module, *_):
        """Initializes as for transformers' own models.

        For other packages' models, transformers passes `is_custom_code=True` and then skips modules
        that have no tensors of their own, such as `CrossAttention`.
        """
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        initialize(module, self.config)


class QwenVLModel(QwenVLPreTrainedModel):
    """Tokens and images to hidden states: `QwenVLForCausalLM` without its head."""

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList()
        for layer_idx in range(config.num_hidden_layers):
            self.h.append(LanguageBlock(config, layer_idx))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTower(**config.tower)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_positions: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Returns the hidden states (B, T, D) after the last norm.

        The arguments are those of `QwenVLForCausalLM.forward`. With `target_positions`, the last
        block returns only these tokens, (count, D): no later layer needs the others.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds

        packed = position_ids is not None and attention_mask is None and past_key_values is None
        if not packed:
            position_ids = None
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
        # Rotary tables and mask come before the images: making a mask may synchronize, which costs
        # nothing while the device has no work yet.
        rotary = self._rotary(x_BTD, position_ids, past_key_values)
        segments = None
        if packed and "cu_seq_lens_q" in kwargs and self._attends_in_segments(x_BTD):
            segments = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        else:
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x_BTD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        x_BTD = self.insert_images(
            x_BTD, input_ids, past_key_values, pixel_values, vision_positions, vision_features
        )
        for block in self.h:
            kept = target_positions if block is self.h[-1] else None
            x_BTD = block(
                x_BTD,
                rotary=rotary,
                attention_mask=attention_mask,
                position_ids=position_ids,  # FlashAttention finds packed samples by them
                past_key_values=past_key_values,
                segments=segments,
                kept=kept,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x_BTD), past_key_values=past_key_values
        )

    def _attends_in_segments(self, x_BTD: torch.Tensor) -> bool:
        return self.config._attn_implementation == "sdpa" and has_segments_kernel(x_BTD)

    def _rotary(
        self, x_BTD: torch.Tensor, position_ids: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rotary tables of all layers.

        They are those of `position_ids` (B, T) for packed samples, and otherwise (None) those of
        the slots that follow the cache.
        """
        config, length, packed = self.config, x_BTD.shape[1], position_ids is not None
        if not packed:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(length, device=x_BTD.device) + past)[None]
        alpha, logn_above = 1, None  # the original applies neither rule in training
        if config.use_dynamic_ntk and not self.training:
            if packed:
                length = int(position_ids.max()) + 1
            alpha = alpha_after(cache, length, config.seq_length)
        if config.use_logn_attn and not self.training:
            logn_above = config.seq_length
        return rotary_tables(
            position_ids,
            config.kv_channels,
            config.rotary_emb_base,
            alpha=alpha,
            logn_above=logn_above,
        )

    def encode_images(
        self, pixel_values: torch.Tensor, run_block: RunBlock | None = None
    ) -> torch.Tensor:
        """Encodes images (N, 3, S, S) as (N, Q, D); `run_block` as in `VisionTower.encode`.

        A frozen tower saves nothing for gradients and computes in its own precision, not in that of
        autocast. Its features are then the same in every run, so they may be stored.
        """
        encode = self.visual
        if run_block is not None:
            encode = partial(self.visual.encode, run_block=run_block)
        trains = any(tensor.requires_grad for tensor in self.visual.parameters())
        if trains or pixel_values.requires_grad:
            return encode(pixel_values)
        with torch.no_grad(), no_autocast(pixel_values.device):
            return encode(pixel_values)

    def _other_ranks_wait_for_tower(self) -> bool:
        """Whether other ranks would block on this rank's vision tower: on its gradients (DDP) or on
        its shards (FSDP)."""
        return any(
            tensor.requires_grad or isinstance(tensor, DTensor)
            for tensor in self.visual.parameters()
        )

    def insert_images(
        self,
        x_BTD: torch.Tensor,
        input_ids: torch.Tensor | None,
        cache: Cache | None,
        pixel_values: torch.Tensor | None,
        positions: torch.Tensor | None,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the embeddings with image tokens written over those at `positions`."""
        if pixel_values is not None and features is not None:
            raise ValueError("give either pixel_values or vision_features")
        has_images = pixel_values is not None or features is not None
        if has_images and cache is not None and cache.get_seq_length() > 0:
            pixel_values = features = None  # the cache contains them already
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values)
        elif features is None and self.training and self._other_ranks_wait_for_tower():
            # Other ranks may have images. One patch is enough to reach every parameter.
            patch_size = self.visual.patch_size
            blank = x_BTD.new_zeros(1, 3, patch_size, patch_size)
            x_BTD = x_BTD + 0 * self.encode_images(blank).mean()
        if features is None or not len(features):
            return x_BTD
        if positions is None:
            positions = find_image_tokens(input_ids, len(features), self.config)
        return write_image_tokens(x_BTD, features, positions)


class QwenVLForCausalLM(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its language model head: logits, losses and `generate`.

    >>> model = QwenVLForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat")  # doctest: +SKIP
    """

    # Applies only if `config.tie_word_embeddings`.
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_positions: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Computes logits, and a loss if `labels` are given.

        Args:
            input_ids, inputs_embeds: (B, T) or (B, T, D), one of the two.
            attention_mask: (B, past + T), 0 at padding; or the mask that `generate` made of it.
            position_ids: (B, T), restarting with every sample of packed rows. They are used only
                without mask and cache. Otherwise positions are slots, counted from the start of
                the row with its padding, as in the original.
            past_key_values: a cache; images are ignored unless it is empty.
            pixel_values: (N, 3, S, S), all images in the order of their tokens.
            vision_positions: (M,), flat indices into B * T of the image tokens. Without them the
                tokens are located in `input_ids`, which synchronizes.
            vision_features: (N, Q, D) from `get_image_features`, in place of `pixel_values`.
            labels: (B, T), not shifted; -100 where a token is not supervised.
            target_positions: (count,), flat indices into B * T of the tokens whose successors are
                supervised. Logits are then computed for these alone, (count, V); the loss is the
                same.
            num_items_in_batch: divides the sum of the losses of all supervised tokens; without it
                the loss is their mean.
            use_cache: whether to fill and return a cache. By default it follows the config in
                evaluation without labels, and is off otherwise; packed rows never have a cache.
            logits_to_keep: how many logits to compute, counted from the end (0: all), or their
                indices.
            kwargs: with `position_ids`, the bounds (n + 1,) of packed samples as `cu_seq_lens_q`
                and `cu_seq_lens_k`, and the longest sample as `max_length_q` and `max_length_k`.
                Kernels that take them need no mask; the results are the same.

        Raises:
            ValueError: images, their tokens and positions disagree, or no token is supervised.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        targeted = labels is not None and target_positions is not None
        if not targeted:
            target_positions = None
        elif not len(target_positions):
            raise ValueError("target_positions is empty: no token of this batch is supervised")
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            vision_positions=vision_positions,
            vision_features=vision_features,
            target_positions=target_positions,
            use_cache=use_cache,
            **kwargs,
        )
        loss = None
        x_BTD = outputs.last_hidden_state  # (count, D) if targeted
        kwargs["vocab_size"] = self.config.vocab_size
        kwargs["num_items_in_batch"] = num_items_in_batch
        if targeted:
            logits = self.lm_head(x_BTD)
            targets = labels.flatten().index_select(0, target_positions + 1)
            loss = self.loss_function(logits, labels=None, shift_labels=targets, **kwargs)
        else:
            kept = logits_to_keep
            if isinstance(logits_to_keep, int):
                kept = slice(-logits_to_keep, None)
            logits = self.lm_head(x_BTD[:, kept])
            if labels is not None:
                loss = self.loss_function(logits, labels=labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def embed(
        self,
        input_ids: torch.Tensor,
        *,
        vision_features: torch.Tensor | None = None,
        vision_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the input (B, T, D) of the first block for ids (B, T) and encoded images."""
        x_BTD = self.transformer.wte(input_ids)
        return self.transformer.insert_images(
            x_BTD, input_ids, None, None, vision_positions, vision_features
        )

    def get_image_features(
        self, pixel_values: torch.Tensor, run_block: RunBlock | None = None
    ) -> torch.Tensor:
        """Encodes images (N, 3, S, S) as the `vision_features` (N, Q, D) of `forward`.

        `run_block` is the one of `VisionTower.encode`.
        """
        return self.transformer.encode_images(pixel_values, run_block)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, prompt_length=None, **kwargs
    ):
        """Passes images with the prompt alone, because afterwards the cache contains them.

        Without a cache they are passed in every step, in rows that have become longer.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if kwargs.get("is_first_iteration"):
            if kwargs.get("past_key_values") is not None:
                forget_alpha(kwargs["past_key_values"])
        elif kwargs.get("use_cache", True):
            for name in IMAGES:
                inputs.pop(name, None)
        elif inputs.get("vision_positions") is not None:
            positions = inputs["vision_positions"]
            rows = positions // prompt_length
            new_tokens = input_ids.shape[1] - prompt_length
            inputs["vision_positions"] = positions + rows * new_tokens
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Repeats rows for beams and for several answers to a row; each image is encoded once."""
        pixel_values, positions, features = (kwargs.pop(name, None) for name in IMAGES)
        images = pixel_values if features is None else features
        embeds = kwargs.get("inputs_embeds")
        length = (input_ids if embeds is None else embeds).shape[1]
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if images is None or not len(images):
            return ids, kwargs
        if positions is None:
            positions = find_image_tokens(input_ids, len(images), self.config)
        if expand_size > 1:
            if features is None:
                pixel_values, features = None, self.get_image_features(pixel_values)
            features = features.repeat(expand_size, 1, 1)
            positions = repeat_positions(positions, expand_size, length)
        kwargs |= {
            "pixel_values": pixel_values,
            "vision_positions": positions,
            "vision_features": features,
            "prompt_length": length,
        }
        return ids, kwargs


def file_shapes(model: QwenVLForCausalLM) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the network's tensors in files, the published layout."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        projection = re.search(r"attn\.([qkv])_proj\.", name)
        if projection is None:
            shapes[name] = tuple(tensor.shape)
        elif projection[1] == "q":
            shapes[name.replace("q_proj.", "in_proj_")] = (3 * tensor.shape[0], *tensor.shape[1:])
    if model.config.tie_word_embeddings:
        for name in model._tied_weights_keys:
            del shapes[name]
    return shapes


def _join_projections(kind: str) -> WeightConverter:
    """In files, the input projections of `CrossAttention` are one tensor: q, k and v in a row."""
    names = [f"attn.{letter}_proj.{kind}" for letter in "qkv"]
    return WeightConverter(f"attn.in_proj_{kind}", names, [Chunk(dim=0)])


# By class and not by model type, because peft rewrites the adapters of model types that have
# conversions.
register_checkpoint_conversion_mapping(
    QwenVLForCausalLM.__name__,
    [_join_projections("weight"), _join_projections("bias")],
    overwrite=True,
)
AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
AutoModelForCausalLM.register(QwenVLConfig, QwenVLForCausalLM, exist_ok=True)
