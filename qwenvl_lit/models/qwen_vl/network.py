"""Qwen-VL as a transformers model: a language model that reads images, or Qwen, which does not.

Weights are saved under the names and in the format of the published checkpoints.
"""

# B batch size, T tokens, D width, V vocabulary size, K width of an attention head, N images,
# Q tokens of an image, S image side in pixels, M = N * Q

from __future__ import annotations

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
from qwenvl_lit.models.qwen_vl.decoder import Decoder
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
    rotary_tables,
)
from qwenvl_lit.models.qwen_vl.vision import RunBlock, VisionTower, no_autocast
from qwenvl_lit.models.segments import has_segments_kernel

IMAGES = ("pixel_values", "vision_positions", "vision_features")  # arguments of `forward`


class QwenVLPreTrainedModel(PreTrainedModel):
    """Declares to transformers what the network supports, and initializes its weights.

    transformers prescribes the names of attributes and methods that begin with an underscore.
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
        """Initializes a module as if the model were part of transformers.

        For models of other packages, transformers passes `is_custom_code=True`, which skips modules
        without tensors of their own, such as `CrossAttention`.
        """
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        initialize(module, self.config)


class QwenVLModel(QwenVLPreTrainedModel):
    """The network that maps tokens and images to hidden states, without language model head."""

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList()
        for layer_idx in range(config.num_hidden_layers):
            self.h.append(LanguageBlock(config, layer_idx))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = None if config.visual is None else VisionTower(**config.tower)
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
        block and this method return the hidden states of only these tokens, (count, D).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds

        packed = position_ids is not None and attention_mask is None and past_key_values is None
        if not packed:
            position_ids = None
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
        # Rotary tables and mask are computed before the images. Creating a mask may synchronize,
        # which costs no time as long as no work is queued on the device.
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
            output_positions = target_positions if block is self.h[-1] else None
            x_BTD = block(
                x_BTD,
                rotary=rotary,
                attention_mask=attention_mask,
                position_ids=position_ids,  # tell FlashAttention where packed samples begin
                past_key_values=past_key_values,
                segments=segments,
                output_positions=output_positions,
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
        """Returns the rotary tables, which all layers share.

        The positions of packed samples are `position_ids` (B, T). With None, positions continue
        those of the tokens in the cache, which include padding.
        """
        config, length, packed = self.config, x_BTD.shape[1], position_ids is not None
        if not packed:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(length, device=x_BTD.device) + past)[None]
        alpha, logn_above = 1, None  # the original Qwen-VL code uses both only for inference
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
        """Encodes images (N, 3, S, S) as (N, Q, D). For `run_block`, see `VisionTower.encode`.

        A frozen vision tower saves no activations, and computes in the precision of its weights
        instead of the autocast precision. Its features are therefore the same in every run, and may
        be stored.
        """
        encode = self.visual
        if run_block is not None:
            encode = partial(self.visual.encode, run_block=run_block)
        is_trained = any(tensor.requires_grad for tensor in self.visual.parameters())
        if is_trained or pixel_values.requires_grad:
            return encode(pixel_values)
        with torch.no_grad(), no_autocast(pixel_values.device):
            return encode(pixel_values)

    def _other_ranks_wait_for_tower(self) -> bool:
        """Returns whether other ranks block on this rank's gradients (DDP) or shards (FSDP)."""
        tensors = () if self.visual is None else self.visual.parameters()
        return any(tensor.requires_grad or isinstance(tensor, DTensor) for tensor in tensors)

    def insert_images(
        self,
        x_BTD: torch.Tensor,
        input_ids: torch.Tensor | None,
        cache: Cache | None,
        pixel_values: torch.Tensor | None,
        positions: torch.Tensor | None,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the embeddings, in which those at `positions` are replaced by image tokens."""
        if pixel_values is not None and features is not None:
            raise ValueError("give either pixel_values or vision_features")
        has_images = pixel_values is not None or features is not None
        if has_images and self.visual is None:
            raise ValueError("the network has no vision tower and reads no images")
        if has_images and cache is not None and cache.get_seq_length() > 0:
            pixel_values = features = None  # the images are part of the cached tokens
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values)
        elif features is None and self.training and self._other_ranks_wait_for_tower():
            # Other ranks may have images. An image of one patch uses every parameter.
            patch_size = self.visual.patch_size
            blank = x_BTD.new_zeros(1, 3, patch_size, patch_size)
            x_BTD = x_BTD + 0 * self.encode_images(blank).mean()
        if features is None or not len(features):
            return x_BTD
        if positions is None:
            positions = find_image_tokens(input_ids, len(features), self.config)
        return write_image_tokens(x_BTD, features, positions)


class QwenVLForCausalLM(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its language model head, which computes logits and losses and generates.

    >>> model = QwenVLForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat")  # doctest: +SKIP
    """

    # transformers uses this mapping only if `config.tie_word_embeddings` is true.
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
            input_ids, inputs_embeds: (B, T) or (B, T, D). Exactly one of the two is given.
            attention_mask: (B, past + T), 0 for padding, or what `generate` derives from it.
            position_ids: (B, T), starting at 0 for every sample of a packed row. They are used only
                without attention mask and cache. Otherwise, as in the original Qwen-VL code,
                positions are counted from the first token of a row, including padding.
            past_key_values: a KV cache. Images are ignored if the cache is not empty.
            pixel_values: (N, 3, S, S), all images in the order of their tokens.
            vision_positions: (M,), flat indices into B * T of the image tokens. Without this
                argument, image tokens are located in `input_ids`, which synchronizes.
            vision_features: (N, Q, D) from `get_image_features`, in place of `pixel_values`.
            labels: (B, T), not shifted, -100 for tokens that are not supervised.
            target_positions: (count,), flat indices into B * T of the tokens whose successors are
                supervised. Only the logits (count, V) of these tokens are then computed. The loss
                is the same.
            num_items_in_batch: the divisor of the summed losses of all supervised tokens. By
                default, the loss is their mean.
            use_cache: whether to fill and return a cache. By default, `config.use_cache` decides in
                evaluation mode without labels, and otherwise there is no cache. Packed rows never
                have one.
            logits_to_keep: the number of logits to compute, counted from the end (0 computes all),
                or the indices of these logits.
            kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, the bounds (n + 1,) of packed samples, and
                `max_length_q` and `max_length_k`, the length of the longest sample. They accompany
                `position_ids`. Kernels that use them need no mask, and the results are the same.

        Raises:
            ValueError: images, image tokens and positions do not match, or no token is supervised.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        only_targets = labels is not None and target_positions is not None
        if not only_targets:
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
        x_BTD = outputs.last_hidden_state  # (count, D) if only_targets
        kwargs["vocab_size"] = self.config.vocab_size
        kwargs["num_items_in_batch"] = num_items_in_batch
        if only_targets:
            logits = self.lm_head(x_BTD)
            targets = labels.flatten().index_select(0, target_positions + 1)
            loss = self.loss_function(logits, labels=None, shift_labels=targets, **kwargs)
        else:
            indices = logits_to_keep
            if isinstance(logits_to_keep, int):
                indices = slice(-logits_to_keep, None)
            logits = self.lm_head(x_BTD[:, indices])
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
        """Returns the input (B, T, D) of the first block for ids (B, T) and image features."""
        x_BTD = self.transformer.wte(input_ids)
        return self.transformer.insert_images(
            x_BTD, input_ids, None, None, vision_positions, vision_features
        )

    def get_image_features(
        self, pixel_values: torch.Tensor, run_block: RunBlock | None = None
    ) -> torch.Tensor:
        """Encodes images (N, 3, S, S) as the argument `vision_features` (N, Q, D) of `forward`.

        For `run_block`, see `VisionTower.encode`.
        """
        return self.transformer.encode_images(pixel_values, run_block)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, prompt_length=None, **kwargs
    ):
        """Passes the images to the first step only, because the cache contains them afterwards.

        Without a cache, images are passed in every step. Rows become longer in each step, so their
        flat positions change.
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

    def decoder(self) -> Decoder:
        """Returns a new decoder; see `Network.decoder`."""
        return Decoder(self)

    def init_continuous_batching(self, *_, **__):
        """Refuses transformers' continuous batching, which `generate_batch` uses.

        It packs prompts into one row with a cache. There, `forward` would ignore their positions,
        and dynamic NTK depends on the length of each prompt, which is not passed.
        """
        raise NotImplementedError(
            "continuous batching (generate_batch) would give wrong answers with Qwen-VL, whose "
            "rotary angles depend on the length of each prompt; use qwenvl_lit.QwenVL, or "
            "generate() with a left-padded batch"
        )

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Repeats rows for beams and for several answers per row, and encodes each image once."""
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


def _join_projections(kind: str) -> WeightConverter:
    """Maps the three projections of `CrossAttention` to the single tensor in files."""
    names = [f"attn.{letter}_proj.{kind}" for letter in "qkv"]
    return WeightConverter(f"attn.in_proj_{kind}", names, [Chunk(dim=0)])


# Registered by class name and not by model type, because peft rewrites the adapters of model types
# that have conversions.
register_checkpoint_conversion_mapping(
    QwenVLForCausalLM.__name__,
    [_join_projections("weight"), _join_projections("bias")],
    overwrite=True,
)
AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
AutoModelForCausalLM.register(QwenVLConfig, QwenVLForCausalLM, exist_ok=True)
