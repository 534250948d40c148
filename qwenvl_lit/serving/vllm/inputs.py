"""Tells vLLM how images become tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from qwenvl_lit.models.qwen_vl.image_processing import resize_image

PLACEHOLDER = "<img></img>"  # of an image, in the prompt of a completion


class ImageInfo(BaseProcessingInfo):
    """The number of images of a prompt, and of tokens of an image."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.get_hf_config().n_queries}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    @property
    def image_size(self) -> int:
        """Width and height of resized images, in pixels."""
        return self.get_hf_config().visual["image_size"]


class DummyImages(BaseDummyInputsBuilder[ImageInfo]):
    """Blank images, with which vLLM measures the memory that images need."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PLACEHOLDER * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        images = self._get_dummy_images(
            width=self.info.image_size,
            height=self.info.image_size,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class ImageProcessor(BaseMultiModalProcessor[ImageInfo]):
    """Resizes images on the host; the model normalizes them on its device."""

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]
    ) -> BatchFeature:
        resized = [resize_image(image, self.info.image_size) for image in hf_data["images"]]
        return BatchFeature({"pixel_values": torch.stack(resized)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        start = config.visual["image_start_id"]
        end, padding = start + 1, start + 2
        span = [start, *[padding] * config.n_queries, end]
        tokens = PromptUpdateDetails.select_token_id(span, padding)
        return [PromptReplacement("image", [start, end], tokens)]
