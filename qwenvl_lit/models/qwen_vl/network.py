"""Qwen-VL: a language model that reads images, as a transformers model. Files written by it carry the original parameter names."""

# B rows, T tokens, D width, V vocabulary, N images, Q tokens of an image, S side of an image in pixels, M = N * Q

from __future__ import annotations

import math
import re
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.language import (
    MLP,
    Attention,
    LanguageBlock,
    RMSNorm,
    has_segments_kernel,
    ntk_alpha,
    rotary_tables,
)
from qwenvl_lit.models.qwen_vl.vision import (
    CrossAttention,
    Resampler,
    VisionBlock,
    VisionTower,
    computed_as_stored,
    sine_cosine_positions,
)

IMAGES = ("pixel_values", "vision_positions", "vision_features")  # arguments of `forward`


class QwenVLPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the network, and how its weights start."""

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
        """As for transformers' own models. For others it passes over modules without tensors of their own, `CrossAttention` among them."""
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module):
        """The original's start. Children are initialised before their parents; a tensor that was loaded is left as it is."""
        super()._init_weights(
            module
        )  # linear layers and embeddings: normal with `initializer_range`; norms: ones; biases: zeros
        if isinstance(module, (Attention, MLP)):
            self._init_residual(module.c_proj)
        elif isinstance(module, VisionBlock):
            self._init_residual(module.mlp.c_proj)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, VisionTower):
            positions, width = module.positional_embedding.shape
            if module.spatial_start:
                init.copy_(module.positional_embedding, sine_cosine_positions(positions, width))
            else:
                init.normal_(module.positional_embedding, std=width**-0.5)
            init.normal_(module.proj, std=len(module.proj) ** -0.5)
        elif isinstance(module, Resampler):
            init.trunc_normal_(module.query, std=0.02)
            init.copy_(module.pos_embed, sine_cosine_positions(*module.pos_embed.shape))
            if module.spatial_start:
                self._init_spatial(module.attn, module.spatial_start)
        elif isinstance(module, CrossAttention):
            gain = math.sqrt(0.5)  # Xavier of the three projections as one matrix
            for layer in (module.v_proj, module.q_proj, module.k_proj):
                init.xavier_uniform_(layer.weight, gain)

    def _init_spatial(self, attention: CrossAttention, strength: float):
        """Not the original's start: queries and keys are projected alike, so that equal positions attract each other."""
        init.orthogonal_(attention.q_proj.weight, gain=strength)
        init.copy_(attention.k_proj.weight, attention.q_proj.weight)

    def _init_residual(self, layer: nn.Linear):
        """GPT-2's smaller start of what is added to the residual stream; the original counts the language blocks, in the tower too."""
        init.normal_(
            layer.weight,
            std=self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers),
        )


class QwenVLModel(QwenVLPreTrainedModel):
    """Tokens and images to hidden states; a part of `QwenVLForCausalLM`, not loaded alone."""

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(
            LanguageBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
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
        """The arguments are those of `QwenVLForCausalLM.forward`; returns hidden states (B, T, D) after the last norm, with
        `target_positions` those of these tokens, (count, D): nothing looks at the others once the last block has attended to them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds

        packed = position_ids is not None and attention_mask is None and past_key_values is None
        if use_cache and past_key_values is None and not packed:
            past_key_values = DynamicCache(config=self.config)
        if not packed:
            position_ids = None
        # Before the images: making a mask may wait for the device, which has nothing to do yet.
        rotary = self._rotary(x_BTD, position_ids, past_key_values)
        segments = None
        if (
            packed
            and "cu_seq_lens_q" in kwargs
            and self.config._attn_implementation == "sdpa"
            and has_segments_kernel(x_BTD)
        ):
            segments = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        else:
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x_BTD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        x_BTD = self._write_images(
            x_BTD, input_ids, past_key_values, pixel_values, vision_positions, vision_features
        )
        for block in self.h:
            last = (
                {"kept": target_positions}
                if target_positions is not None and block is self.h[-1]
                else {}
            )
            x_BTD = block(
                x_BTD,
                rotary=rotary,
                attention_mask=attention_mask,
                position_ids=position_ids,  # FlashAttention finds packed samples by them
                past_key_values=past_key_values,
                segments=segments,
                **last,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x_BTD), past_key_values=past_key_values
        )

    def _rotary(
        self, x_BTD: torch.Tensor, position_ids: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary tables of all layers for packed samples (`position_ids` (B, T)) or, without, for the slots that follow the cache."""
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(x_BTD.shape[1], device=x_BTD.device) + past)[None]
            alpha = self._alpha(x_BTD.shape[1], cache)
        else:
            alpha = 1 if self.training else self._alpha(int(position_ids.max()) + 1, None)
        logn_above = (
            self.config.seq_length if self.config.use_logn_attn and not self.training else None
        )
        return rotary_tables(
            position_ids,
            self.config.kv_channels,
            self.config.rotary_emb_base,
            alpha=alpha,
            logn_above=logn_above,
        )

    def _alpha(self, length: int, cache: Cache | None) -> int:
        """Dynamic NTK's alpha for `length` tokens after the cache.

        It follows from the length of the prompt and stays for all that is decoded after it: keys in the cache are not turned again. One
        generation is one cache, so the cache keeps it, and no other text and no training step can meet it.
        """
        if self.training or not self.config.use_dynamic_ntk:
            return 1
        if cache is None:
            return ntk_alpha(length, self.config.seq_length)
        past = cache.get_seq_length()
        # A static cache counts on the device. A decoding step must not wait for that, and need not: it is no prompt.
        known = isinstance(past, int) or (length > 1 and not torch.compiler.is_compiling())
        if not hasattr(cache, "ntk_alpha") or (known and past == 0):
            cache.ntk_alpha = ntk_alpha(length, self.config.seq_length)
        return cache.ntk_alpha

    def see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, S, S) -> (N, Q, D). A tower that does not train keeps nothing for gradients and computes in its own precision,
        whatever trains after it: so its features are always the same, and may be stored."""
        if pixel_values.requires_grad or any(
            tensor.requires_grad for tensor in self.visual.parameters()
        ):
            return self.visual(pixel_values)
        with torch.no_grad(), computed_as_stored(pixel_values.device):
            return self.visual(pixel_values)

    def _others_wait_for_the_tower(self) -> bool:
        """For this rank's part of its gradients; or, where ranks share the weights, of its weights."""
        return any(
            tensor.requires_grad or isinstance(tensor, DTensor)
            for tensor in self.visual.parameters()
        )

    def _write_images(
        self,
        x_BTD: torch.Tensor,
        input_ids: torch.Tensor | None,
        cache: Cache | None,
        pixel_values: torch.Tensor | None,
        positions: torch.Tensor | None,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """The embeddings with the tokens of images written over those at `positions`."""
        if pixel_values is not None and features is not None:
            raise ValueError("give either pixel_values or vision_features")
        if (
            (pixel_values is not None or features is not None)
            and cache is not None
            and cache.get_seq_length() > 0
        ):
            pixel_values = features = None  # they are in the cache
        if pixel_values is not None and len(pixel_values):
            features = self.see(pixel_values)
        elif features is None and self.training and self._others_wait_for_the_tower():
            # Other ranks may have images. One patch is enough to reach every parameter.
            nothing = x_BTD.new_zeros(1, 3, self.visual.patch_size, self.visual.patch_size)
            x_BTD = x_BTD + 0 * self.see(nothing).mean()
        if features is None or not len(features):
            return x_BTD
        if positions is None:
            positions = find_image_tokens(input_ids, len(features), self.config)
        if features.shape[:2].numel() != len(positions):
            raise ValueError(
                f"vision_positions has {len(positions)} entries, but {features.shape[0]} images have {features.shape[1]} tokens each"
            )
        return (
            x_BTD.flatten(0, 1)
            .index_copy(0, positions, features.flatten(0, 1).to(x_BTD.dtype))
            .view_as(x_BTD)
        )


class QwenVLForCausalLM(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its head: losses, and `generate`.

    >>> model = QwenVLForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat")  # doctest: +SKIP
    """

    _tied_weights_keys: ClassVar = {
        "lm_head.weight": "transformer.wte.weight"
    }  # only if `tie_word_embeddings`

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
        """Logits, and a loss where `labels` are given.

        Args:
            input_ids, inputs_embeds: (B, T) or (B, T, D), one of the two.
            attention_mask: (B, past + T), 0 at padding; or what `generate` made of it.
            position_ids: (B, T), restarting with every sample of packed rows. They count only without mask and cache; else positions
                are slots, counted from the start of the row with its padding, as in the original.
            past_key_values: a cache; images are ignored unless it is empty.
            pixel_values: (N, 3, S, S), all images in the order of their spans.
            vision_positions: (M,), the tokens that they take the place of, as flat indices into B * T. Without them, the spans are
                looked for in `input_ids`, which waits for the device.
            vision_features: (N, Q, D) from `get_image_features`, in place of `pixel_values`.
            labels: (B, T), not shifted; -100 where nothing is learned.
            target_positions: (count,), the tokens whose successors are learned, as flat indices into B * T. Logits are then computed for
                these alone, (count, V); the loss is the same.
            num_items_in_batch: the loss is the sum over all learned tokens divided by this; left out, it is their mean.
            use_cache: fill a cache and return it. Left out, this is done in evaluation without labels if the config says so; packed
                rows never have one.
            logits_to_keep: compute the logits of the last so many tokens (0: all) or at these indices.
            kwargs: beside `position_ids`, the bounds (n + 1,) of packed samples as `cu_seq_lens_q` and `cu_seq_lens_k`, and the longest as
                `max_length_q` and `max_length_k`, for kernels that need no mask then. They change nothing but the time.

        Raises:
            ValueError: images, spans and positions that disagree; no target at all.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        targeted = labels is not None and target_positions is not None
        if targeted and not len(target_positions):
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
            target_positions=target_positions if targeted else None,
            use_cache=use_cache,
            **kwargs,
        )
        x_BTD = outputs.last_hidden_state  # (count, D) if targeted
        loss, sizes = (
            None,
            {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch},
        )
        if targeted:
            logits = self.lm_head(x_BTD)
            targets = labels.flatten().index_select(0, target_positions + 1)
            loss = self.loss_function(logits, labels=None, shift_labels=targets, **sizes, **kwargs)
        else:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(x_BTD[:, kept])
            if labels is not None:
                loss = self.loss_function(logits, labels=labels, **sizes, **kwargs)
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
        """Ids (B, T) as what the first block reads, (B, T, D); images (N, Q, D) from `get_image_features` in their places."""
        x_BTD = self.transformer.wte(input_ids)
        return self.transformer._write_images(
            x_BTD, input_ids, None, None, vision_positions, vision_features
        )

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, S, S) -> what `forward` takes as `vision_features`, (N, Q, D)."""
        return self.transformer.see(pixel_values)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, prompt_length=None, **kwargs
    ):
        """Images go in with the prompt; after it they are in the cache. Without one they go in each time, and rows get longer."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if kwargs.get("is_first_iteration"):
            cache = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length() == 0:
                vars(cache).pop(
                    "ntk_alpha", None
                )  # transformers uses a static cache again for the next prompt
        elif kwargs.get("use_cache", True):
            for name in IMAGES:
                inputs.pop(name, None)
        elif (positions := inputs.get("vision_positions")) is not None:
            inputs["vision_positions"] = positions + positions // prompt_length * (
                input_ids.shape[1] - prompt_length
            )
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Repeats rows for beams and for several answers. The images go through the tower once, whatever the number of rows."""
        pixel_values, positions, features = (kwargs.pop(name, None) for name in IMAGES)
        images = pixel_values if features is None else features
        length = (
            input_ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        ).shape[1]
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
            copies = torch.arange(expand_size, device=positions.device)[:, None]
            rows = (
                positions // length * expand_size + copies
            )  # row r becomes the rows r * expand_size, r * expand_size + 1, ...
            positions = (rows * length + positions % length).flatten()
        return ids, kwargs | dict(zip(IMAGES, (pixel_values, positions, features), strict=True)) | {
            "prompt_length": length
        }


def find_image_tokens(
    input_ids: torch.Tensor | None, images: int, config: QwenVLConfig
) -> torch.Tensor:
    """Flat indices (M,) into `input_ids` (B, T) of the tokens between `<img>` and `</img>`, in reading order. Waits for the device.

    Raises:
        ValueError: not one span of `config.n_queries` tokens for each image.
    """
    if input_ids is None:
        raise ValueError(
            "inputs_embeds with images need vision_positions: there are no ids to find the images' places by"
        )
    start = config.visual["image_start_id"]
    starts, ends = ((input_ids.flatten() == tag).nonzero().squeeze(1) for tag in (start, start + 1))
    if not len(starts) == len(ends) == images:
        raise ValueError(
            f"{images} images, but the text has {len(starts)} <img> and {len(ends)} </img>"
        )
    lengths = ends - starts - 1
    if (lengths != config.n_queries).any():
        raise ValueError(
            f"an image takes {config.n_queries} tokens, but those between <img> and </img> are {lengths.tolist()}"
        )
    return (starts[:, None] + torch.arange(1, config.n_queries + 1, device=starts.device)).flatten()


def file_shapes(model: QwenVLForCausalLM) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the network's weights have in files, the published layout."""
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


# By class and not by model type, because peft rewrites the adapters of model types that have conversions.
register_checkpoint_conversion_mapping(
    QwenVLForCausalLM.__name__,
    [
        WeightConverter(
            f"attn.in_proj_{kind}", [f"attn.{name}_proj.{kind}" for name in "qkv"], [Chunk(dim=0)]
        )
        for kind in ("weight", "bias")
    ],
    overwrite=True,
)
AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
AutoModelForCausalLM.register(QwenVLConfig, QwenVLForCausalLM, exist_ok=True)
