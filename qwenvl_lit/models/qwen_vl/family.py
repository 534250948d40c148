"""Qwen-VL and Qwen-VL-Chat: a checkpoint's weights and vocabulary, or random weights of any size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from qwenvl_lit.models.chatml import Supervise
from qwenvl_lit.models.components import network_of
from qwenvl_lit.models.protocols import FeatureSource
from qwenvl_lit.models.qwen_vl.checkpoint import (
    NF4,
    VOCABULARY,
    bnb_config,
    find_checkpoint,
    open_shard,
    stored_tensors,
)
from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.flops import training_flops
from qwenvl_lit.models.qwen_vl.image_processing import normalised
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM, file_shapes
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor, Template, TooLong
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY, QwenTokenizer
from qwenvl_lit.types import Batch


class QwenVLFamily:
    """The family: a checkpoint's weights and vocabulary, or random weights of any size.

    Args:
        path: a checkpoint's folder or its name on the hub; None for random weights.
        weights: "checkpoint", or "random": the network of `path` (a folder's, else the published one) as it starts, to try and to measure.
        config: fields of `QwenVLConfig` for random weights without `path`; `vocab_size` and `image_start_id` follow from the vocabulary.
        vocabulary: a file in tiktoken's format, or "tiny" for the one of the demo; None: the checkpoint's `qwen.tiktoken`.
        download: whether a hub name may be fetched.
        device_map, max_memory: how transformers spreads the network over cards and host memory, say "auto" and {0: "10GiB"}; to predict and
            to chat only. None: all of it on one device.
        dtype: of the weights, by torch's name.
        load_in_4bit: to answer, hold linear layers but the head in 4 bits, the tower's too; to train over 4 bits, an adapter says so.
        seed: of random weights.
        window: as for `QwenVLProcessor`; None: that of the checkpoint's `generation_config.json`, else the published 6144.

    The others are those of `QwenVLProcessor`.
    """

    components: Mapping[str, str] = {
        "vision": "transformer.visual",
        "resampler": "transformer.visual.attn_pool",
        "language": "transformer.h",
        "embeddings": "transformer.wte",
        "head": "lm_head",
    }
    lora_targets: Mapping[str, str] = {
        "attention": r"transformer\.h\.\d+\.attn\.c_attn",
        "language": r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.w1|mlp\.w2)",
    }
    supports_packing = True

    def __init__(
        self,
        *,
        path: str | None = None,
        weights: Literal["checkpoint", "random"] = "checkpoint",
        config: Mapping[str, Any] | None = None,
        vocabulary: str | None = None,
        download: bool = True,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, str] | None = None,
        template: Template = "chatml",
        system: str | None = None,
        supervise: Supervise = "answers",
        max_length: int | None = None,
        too_long: TooLong = "error",
        window: int | None = None,
        dtype: str = "float32",
        load_in_4bit: bool = False,
        seed: int = 0,
    ):
        if (path is None) == (config is None):
            raise ValueError("a model has either a `path`, or a `config` for random weights")
        if weights not in ("checkpoint", "random"):
            raise ValueError(f"weights is checkpoint or random, got {weights!r}")
        self.random = weights == "random" or path is None
        if self.random and device_map is not None:
            raise ValueError(
                "random weights are drawn on one device; device_map is for checkpoints"
            )
        if path is None and vocabulary is None:
            raise ValueError('random weights need a `vocabulary`: a file, or "tiny"')
        if not (
            isinstance(named := getattr(torch, dtype, None), torch.dtype)
            and named.is_floating_point
        ):
            raise ValueError(f"dtype is a name of torch's, as float32 or bfloat16, got {dtype!r}")
        self.path = path
        self.sizes = dict(config or {})
        self.vocabulary = vocabulary
        self.download = download
        self.device_map = device_map
        self.max_memory = max_memory
        self.prompting: dict[str, Any] = {
            "template": template,
            "system": system,
            "supervise": supervise,
            "max_length": max_length,
            "too_long": too_long,
        }
        self.window = window
        self.dtype = dtype
        self.quantization = NF4 if load_in_4bit else None
        self.seed = seed

    @cached_property
    def folder(self) -> Path | None:
        """Where the checkpoint is, fetched if need be; None if all there is are the published sizes and random weights."""
        if not self.random:
            return find_checkpoint(str(self.path), download=self.download)
        return (
            Path(self.path).expanduser()
            if self.path and Path(self.path).expanduser().is_dir()
            else None
        )

    @cached_property
    def tokenizer(self) -> QwenTokenizer:
        if self.vocabulary is not None:
            return QwenTokenizer(TINY_VOCABULARY if self.vocabulary == "tiny" else self.vocabulary)
        if self.folder is None:
            raise ValueError(
                f"random weights of {self.path} come without a vocabulary: give model.vocabulary=FILE, a copy of its {VOCABULARY}, or "
                f"model.vocabulary=tiny, which cuts words into more tokens"
            )
        return QwenTokenizer(self.folder / VOCABULARY)

    @cached_property
    def config(self) -> QwenVLConfig:
        """The network's config.

        Raises:
            ValueError: it and the vocabulary disagree.
        """
        tokenizer = self.tokenizer
        if self.folder is not None:
            config = QwenVLConfig.from_pretrained(self.folder)
        else:
            start = {"image_start_id": tokenizer.img_start_id}
            if self.path is not None:  # the published sizes, embeddings included
                config = QwenVLConfig(visual={**QWEN_VL_VISUAL, **start})
            else:
                ids = -(-tokenizer.vocab_size // 16) * 16  # a round number of rows
                visual = {**start, **self.sizes.get("visual", {**QWEN_VL_VISUAL, **start})}
                config = QwenVLConfig(**{"vocab_size": ids, **self.sizes, "visual": visual})
        assert config.visual is not None  # the config fills it in
        configured = config.visual["image_start_id"]
        if (
            configured != tokenizer.img_start_id
        ):  # the last ids but two, hence this covers the number of ids
            raise ValueError(
                f"<img> is {tokenizer.img_start_id} in {tokenizer.path}, but `image_start_id` of the model's config is {configured}; "
                f"choose the vocabulary of this model"
            )
        return config

    @cached_property
    def generation(self) -> GenerationConfig:
        """What `generation_config.json` of the checkpoint says; without the file, what transformers does by itself."""
        stored = self.folder is not None and (self.folder / "generation_config.json").exists()
        return GenerationConfig.from_pretrained(self.folder) if stored else GenerationConfig()

    def processor(self, features: FeatureSource | None = None) -> QwenVLProcessor:
        assert self.config.visual is not None
        window = self.window or getattr(self.generation, "max_window_size", 6144)
        side = self.config.visual["image_size"]
        return QwenVLProcessor(
            self.tokenizer,
            span=self.config.n_queries,
            side=side,
            window=window,
            features=features,
            **self.prompting,
        )

    def meta_model(self) -> QwenVLForCausalLM:
        """The network on the meta device: names, shapes and types, without weights."""
        with torch.device("meta"):
            return QwenVLForCausalLM(self.config).to(getattr(torch, self.dtype))

    def load(
        self, device: torch.device | str = "cpu", *, quantization: Mapping[str, Any] | None = None
    ) -> QwenVLForCausalLM:
        """The network in evaluation mode on `device`, or spread out by `device_map`. Weights go there tensor by tensor, and those of linear
        layers but the head become what `quantization` says, settings of `BitsAndBytesConfig`, on their way.

        Random weights depend on `seed` alone up to 1 B parameters; larger networks are drawn on `device`, by its own generator.

        Raises:
            DataError: the checkpoint's tensors are not those of its config.
        """
        dtype = getattr(torch, self.dtype)
        if self.random:
            model = self._drawn(torch.device(device), dtype)
            return self.quantized(model, device, quantization) if quantization else model
        assert self.folder is not None
        shapes = file_shapes(self.meta_model())
        try:
            tensors = stored_tensors(self.folder, shapes)
            if self.device_map is None:
                model = self._placed(tensors, device, quantization)
            else:
                offloaded = TemporaryDirectory()  # what fits neither cards nor memory
                places = {
                    "device_map": self.device_map,
                    "max_memory": self.max_memory,
                    "offload_folder": offloaded.name,
                }
                places["quantization_config"] = self._bnb_config(quantization)
                model = QwenVLForCausalLM.from_pretrained(self.folder, dtype=dtype, **places)
                model.offloaded = offloaded  # removed with the model
        finally:
            open_shard.cache_clear()  # which keeps the last files mapped
        model.generation_config = self.generation
        return model.eval()

    def quantized(
        self, model: QwenVLForCausalLM, device: torch.device | str, quantization: Mapping[str, Any]
    ) -> QwenVLForCausalLM:
        """The network with the weights of `model`, which may be elsewhere, as `load` gives it."""
        placed = self._placed(model.state_dict(), device, quantization)
        placed.generation_config = model.generation_config
        return placed.eval()

    def _placed(
        self,
        tensors: Mapping[str, Any],
        device: torch.device | str,
        quantization: Mapping[str, Any] | None,
    ) -> QwenVLForCausalLM:
        options = {
            "config": self.config,
            "dtype": getattr(torch, self.dtype),
            "quantization_config": self._bnb_config(quantization),
        }
        return QwenVLForCausalLM.from_pretrained(
            None, state_dict=tensors, device_map={"": device}, **options
        )

    def _bnb_config(self, quantization: Mapping[str, Any] | None) -> BitsAndBytesConfig | None:
        return (
            bnb_config(
                quantization, dtype=getattr(torch, self.dtype), but=[self.components["head"]]
            )
            if quantization
            else None
        )

    def _drawn(self, device: torch.device, dtype: torch.dtype) -> QwenVLForCausalLM:
        with torch.device("meta"):
            parameters = QwenVLForCausalLM(self.config).num_parameters()
        place = torch.device("cpu") if parameters < 1e9 else device
        drawn_in = (
            torch.float32 if parameters < 1e9 else dtype
        )  # a second copy of a large one would not fit
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
            generator = (
                torch.cuda.default_generators[place.index or 0]
                if place.type == "cuda"
                else torch.default_generator
            )
            generator.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(self.config, dtype=drawn_in)
        return model.to(device=device, dtype=dtype).eval()

    def inputs(self, batch: Batch, *, generate: bool = False) -> dict[str, Any]:
        """Arguments of `forward`, for rows padded on the right, or of `generate`, for rows padded on the left.

        The former get no mask: causal attention never sees what follows a token, and runs faster without. Packed rows have the bounds of
        their segments under the names that transformers' kernels know.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if generate:
            inputs |= {"attention_mask": batch.attention_mask}
        if (
            len(batch.vision_positions) or "vision_features" in batch.vision
        ):  # even of no images: they say that no tower is needed
            seen = dict(batch.vision)
            if (pixels := seen.get("pixel_values")) is not None and pixels.dtype == torch.uint8:
                seen["pixel_values"] = normalised(pixels)
            inputs |= {**seen, "vision_positions": batch.vision_positions}
        if batch.segment_bounds is not None:
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch.segment_bounds)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch.longest_segment)
        if len(batch.target_positions) and not generate:
            inputs |= {"labels": batch.labels, "target_positions": batch.target_positions}
        elif not generate:
            inputs |= {"logits_to_keep": 1}  # of a row of padding, all would fill the memory
        return {name: value for name, value in inputs.items() if value is not None}

    def image_features(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(N, side, side, 3) uint8 -> (N, Q, D)."""
        return network_of(model).get_image_features(normalised(pixels))

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> float:
        counts = {
            "images": len(batch.vision.get("pixel_values", ())),
            "targets": len(batch.target_positions),
        }
        return training_flops(self.config, lengths=batch.lengths, **counts, trained=trained)
