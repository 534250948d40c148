"""Qwen-VL as vLLM runs it: our vision tower, and the language model of vLLM's layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import (
    SupportsLoRA,
    SupportsMRoPE,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.dynamic_ntk import ntk_alpha
from qwenvl_lit.models.qwen_vl.image_processing import normalize_pixels
from qwenvl_lit.models.qwen_vl.vision import VisionTower
from qwenvl_lit.serving.vllm.inputs import PLACEHOLDER, DummyImages, ImageInfo, ImageProcessor
from qwenvl_lit.serving.vllm.language import ServedLanguage, packed_positions

JOINED = "attn_pool.attn.in_proj_"  # one tensor in files, three in the resampler
# vLLM compares the last part of a layer's name with those that it can adapt, and `c_proj` of the
# vision tower is named like one of the language model. Under this name an adapter is refused.
UNSERVED = r"transformer.visual.\1.vision_layer.lora_\2"


@MULTIMODAL_REGISTRY.register_processor(ImageProcessor, info=ImageInfo, dummy_inputs=DummyImages)
class QwenVLForServing(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP, SupportsMRoPE):
    """Qwen-VL with tensor and pipeline parallelism, and with LoRA on the language model.

    The vision tower is replicated on all ranks.
    """

    packed_modules_mapping: ClassVar = {"c_attn": ["c_attn"], "gate_up_proj": ["w2", "w1"]}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={re.compile(r"^transformer\.visual\.(.*)\.lora_([AB])"): UNSERVED},
        orig_to_new_prefix={"transformer.visual.": "visual.", "transformer.": "language."},
        orig_to_new_stacked={
            ".mlp.w2": (".mlp.gate_up_proj", 0),
            ".mlp.w1": (".mlp.gate_up_proj", 1),
        },
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        return PLACEHOLDER

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: QwenVLConfig = vllm_config.model_config.hf_config
        self.config = config
        with self._mark_tower_model(vllm_config, "image"):
            self.visual = VisionTower(**config.tower)
        with self._mark_language_model(vllm_config):
            self.language = ServedLanguage(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language")
            )
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.language.make_empty_intermediate_tensors

    def get_language_model(self) -> nn.Module:
        return self.language

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language",
            connector="visual.attn_pool",
            tower_model="visual.transformer",
        )

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Returns positions (3, T) that carry the alpha of the prompt, see `packed_positions`."""
        length = len(input_tokens)
        positions, offset = packed_positions(length, ntk_alpha(length, self.config.seq_length))
        return positions.repeat(3, 1), offset

    def embed_multimodal(self, **kwargs: Any) -> Sequence[torch.Tensor] | torch.Tensor:
        """Returns the tokens of images (N, size, size, 3) uint8, as (N, Q, D)."""
        pixels = kwargs.get("pixel_values")
        return [] if pixels is None else self.visual(normalize_pixels(pixels))

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x_TD = self.language.wte(input_ids)
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return x_TD
        images = torch.cat(list(multimodal_embeddings)).to(x_TD.dtype)
        return x_TD.masked_scatter(is_multimodal[:, None].to(x_TD.device), images)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | IntermediateTensors:
        return self.language(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads tensors by their published names."""
        loader = AutoWeightsLoader(self)
        return loader.load_weights(_split_projections(weights), mapper=self.hf_to_vllm_mapper)


def _split_projections(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields tensors by name, those of the resampler's projections one by one."""
    for name, tensor in weights:
        before, joined, kind = name.partition(JOINED)
        if not joined:
            yield name, tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{before}attn_pool.attn.{letter}_proj.{kind}", part
