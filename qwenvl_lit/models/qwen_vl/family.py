"""Qwen-VL and Qwen-VL-Chat: from a checkpoint, or with random weights of any size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import GenerationConfig

from qwenvl_lit.bounds import check_number
from qwenvl_lit.models.chat_processor import TooLong
from qwenvl_lit.models.chatml import Supervise
from qwenvl_lit.models.checkpoint_files import (
    Published,
    find_checkpoint,
    read_generation_config,
)
from qwenvl_lit.models.components import network_of
from qwenvl_lit.models.loading import LoadsWeights, check_source, float_dtype
from qwenvl_lit.models.protocols import FeatureSource
from qwenvl_lit.models.quantization import NF4
from qwenvl_lit.models.qwen_vl.checkpoint import (
    QWEN_VL,
    VOCABULARY,
    read_network_config,
    stored_tensors,
)
from qwenvl_lit.models.qwen_vl.config import QWEN_VL_VISUAL, QwenVLConfig
from qwenvl_lit.models.qwen_vl.export import file_shapes, reader, write_companions, write_weights
from qwenvl_lit.models.qwen_vl.flops import training_flops
from qwenvl_lit.models.qwen_vl.image_processing import normalize_pixels
from qwenvl_lit.models.qwen_vl.memory import answering_bytes, loss_bytes
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor, Template
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTextTokenizer, QwenTokenizer
from qwenvl_lit.models.qwen_vl.vision import no_autocast
from qwenvl_lit.models.qwen_vl.vocabulary import find_vocabulary
from qwenvl_lit.models.stored_tensors import open_shard
from qwenvl_lit.models.weight_files import Read, check_disk
from qwenvl_lit.settings import BoxForm
from qwenvl_lit.types import Batch

# Path of a layer of the resampler's attention, in the name of a tensor of its adapter
RESAMPLER_ATTENTION = re.compile(r"(transformer\.visual\.attn_pool\.attn\.\w+)\.lora_")
WINDOW = 6144  # `max_window_size` of the published generation_config.json


class QwenVLFamily(LoadsWeights):
    """Builds the network and the processor of Qwen-VL.

    Args:
        path: folder of a checkpoint, or its name on the hub; None: random weights.
        weights: "checkpoint"; or "random", an untrained network of the size of `path` (that of the
            folder, else the published one), for tests and measurements.
        config: fields of `QwenVLConfig`, for random weights without `path`. `vocab_size` and
            `image_start_id` follow from the vocabulary.
        vocabulary: a file in tiktoken's format; a folder or hub name that has a `qwen.tiktoken`; or
            "tiny" for that of the demo. None: the checkpoint's `qwen.tiktoken`.
        download: whether a hub name may be fetched.
        device_map, max_memory: how transformers distributes the network over GPUs and host memory,
            for example "auto" and {0: "10GiB"}; for inference only. None: all of it on one device.
        template, system, supervise, max_length, too_long, special_tokens, boxes: see
            `QwenVLProcessor`.
        max_window_size: see `QwenVLProcessor`; None: the value in the checkpoint's
            `generation_config.json`, else the published 6144.
        dtype: of the weights, as torch names it.
        load_in_4bit: quantize the linear layers except the head, those of the vision tower
            included, for inference. To train over 4-bit weights, use an adapter that says so.
        seed: of random weights.
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
    machine_settings = ("device_map", "max_memory", "download", "load_in_4bit")
    base_settings = ("path", "config", "weights", "vocabulary", "seed")
    network_class = QwenVLForCausalLM
    published: ClassVar[Published] = QWEN_VL
    tokenizer_class: ClassVar[type[QwenTextTokenizer]] = QwenTokenizer
    processor_class = QwenVLProcessor
    supports_packing = True
    supports_vision_cache = True
    fixed_image_size = True
    fsdp_units = ("LanguageBlock", "VisionBlock", "Resampler")

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
        special_tokens: Sequence[str] | None = None,
        boxes: BoxForm | None = None,
        max_window_size: int | None = None,
        dtype: str = "float32",
        load_in_4bit: bool = False,
        seed: int = 0,
    ):
        check_source(path, config, weights)
        check_number("model.seed", seed, least=0, most=2**63 - 1, whole=True)
        self.random = weights == "random" or path is None
        if self.random and device_map is not None:
            raise ValueError("device_map is for checkpoints; random weights are made on one device")
        if path is None and vocabulary is None:
            raise ValueError('random weights need a `vocabulary`: a file, or "tiny"')
        self.path = path
        self.sizes = dict(config or {})
        self.vocabulary = vocabulary
        self.download = download
        self.device_map = device_map
        self.max_memory = max_memory
        self.template = template
        self.system = system
        self.supervise = supervise
        self.max_length = max_length
        self.too_long = too_long
        self.special_tokens = special_tokens
        self.boxes: BoxForm | None = boxes
        self.max_window_size = max_window_size
        self.dtype = float_dtype(dtype)
        self.quantization = NF4 if load_in_4bit else None
        self.seed = seed

    @cached_property
    def folder(self) -> Path | None:
        """The folder of the checkpoint, fetched if necessary; None: there is only a config."""
        if not self.random:
            options: Any = {"download": self.download, "vocabulary": self.vocabulary}
            return find_checkpoint(str(self.path), self.published, **options)
        if self.path and Path(self.path).expanduser().is_dir():
            return Path(self.path).expanduser()
        return None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, of the class `tokenizer_class`."""
        if self.vocabulary is not None:
            file = find_vocabulary(self.vocabulary, self.folder, download=self.download)
            return self.tokenizer_class(file)
        if self.folder is None:
            raise ValueError(
                f"random weights of {self.path} come without a vocabulary: give "
                f"model.vocabulary=FILE, a copy of its {VOCABULARY}, or model.vocabulary=tiny, "
                f"which splits words into more tokens"
            )
        return self.tokenizer_class(self.folder / VOCABULARY)

    @cached_property
    def config(self) -> QwenVLConfig:
        """The config of the network.

        Raises:
            ValueError: config and vocabulary do not match.
        """
        tokenizer = self.tokenizer
        if self.folder is not None:
            config = read_network_config(self.folder)
        elif self.path is not None:  # the published sizes, with the published number of embeddings
            visual = {**QWEN_VL_VISUAL, "image_start_id": tokenizer.img_start_id}
            config = QwenVLConfig(visual=visual)
        else:
            config = self._config_from_sizes(tokenizer)
        if config.visual is None:
            raise ValueError(
                "model.config.visual is null: the language model alone is another kind of model, "
                "such as model=qwen_tiny"
            )
        configured = config.visual["image_start_id"]
        # Only two ids follow this one, so that the number of ids is checked too.
        if configured != tokenizer.img_start_id:
            raise ValueError(
                f"<img> is {tokenizer.img_start_id} in {tokenizer.path}, but `image_start_id` of "
                f"the model's config is {configured}; choose the vocabulary of this model"
            )
        return config

    def _config_from_sizes(self, tokenizer: QwenTokenizer) -> QwenVLConfig:
        multiple_of_16 = -(-tokenizer.vocab_size // 16) * 16
        visual = {"image_start_id": tokenizer.img_start_id}
        given = self.sizes.get("visual", QWEN_VL_VISUAL)
        visual = None
        if given is not None:
            # Sizes of a file of conf/model, or the published ones with the id of this vocabulary
            first_id = {"image_start_id": tokenizer.img_start_id}
            visual = {**first_id, **given} if "visual" in self.sizes else {**given, **first_id}
        return QwenVLConfig(**{"vocab_size": multiple_of_16, **self.sizes, "visual": visual})

    @property
    def max_tokens(self) -> int:
        return self.config.max_position_embeddings

    @cached_property
    def generation(self) -> GenerationConfig:
        """The checkpoint's `generation_config.json`, or transformers' defaults without the file."""
        return GenerationConfig() if self.folder is None else read_generation_config(self.folder)

    def processor(self, features: FeatureSource | None = None) -> QwenVLProcessor:
        """Returns a processor; see `Family.processor`."""
        assert self.config.visual is not None
        return self.processor_class(
            self.tokenizer,
            tokens_per_image=self.config.n_queries,
            image_size=self.config.visual["image_size"],
            features=features,
            **self.processor_settings(),
        )

    def processor_settings(self) -> dict[str, Any]:
        """Returns the arguments of the processor that do not depend on a vision tower."""
        window = self.max_window_size or getattr(self.generation, "max_window_size", WINDOW)
        return {
            "template": self.template,
            "system": self.system,
            "supervise": self.supervise,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "special_tokens": self.special_tokens,
            "boxes": self.boxes,
            "max_window_size": window,
        }

    def meta_model(self) -> QwenVLForCausalLM:
        """Returns the network on the meta device: names, shapes and dtypes without weights."""
        with torch.device("meta"):
            return QwenVLForCausalLM(self.config).to(self.dtype)

    def checkpoint_tensors(self) -> Mapping[str, Any]:
        """Returns the tensors of the checkpoint; see `LoadsWeights.checkpoint_tensors`."""
        assert self.folder is not None
        return stored_tensors(self.folder, file_shapes(self.meta_model()), self.published)

    def inputs(self, batch: Batch, *, generate: bool = False) -> dict[str, Any]:
        """Returns arguments of `forward`, for right-padded rows, or of `generate`, for left-padded.

        Those of `forward` have no attention mask: causal attention never looks at what follows a
        token, and is faster without one. Packed rows have the bounds of their segments under the
        names that transformers' attention kernels use.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if generate:
            inputs["attention_mask"] = batch.attention_mask
        # Features of no images are passed on too: without them the vision tower would run.
        if len(batch.vision_positions) or "vision_features" in batch.vision:
            inputs |= batch.vision
            inputs["vision_positions"] = batch.vision_positions
            pixels = batch.vision.get("pixel_values")
            if pixels is not None and pixels.dtype == torch.uint8:
                inputs["pixel_values"] = normalize_pixels(pixels)
        if batch.segment_bounds is not None:
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch.segment_bounds)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch.longest_segment)
        if len(batch.target_positions) and not generate:
            inputs |= {"labels": batch.labels, "target_positions": batch.target_positions}
        elif not generate:
            # Without targets one position is enough; the logits of all would fill the memory.
            inputs["logits_to_keep"] = 1
        return {name: value for name, value in inputs.items() if value is not None}

    def image_features(self, model: nn.Module, vision: Mapping[str, Any]) -> list[torch.Tensor]:
        """Returns the features (Q, D) of each image; see `Family.image_features`."""
        pixels = normalize_pixels(vision["pixel_values"])
        return list(network_of(model).get_image_features(pixels))

    def image_grids(self, vision: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Returns the rows and columns of the patches of each image; see `Family.image_grids`."""
        assert self.config.visual is not None
        pixels = vision["pixel_values"]
        patches = pixels.shape[1] // self.config.visual["patch_size"]
        return [(patches, patches)] * len(pixels)

    @torch.no_grad()
    def query_attention(self, model: nn.Module, vision: Mapping[str, Any]) -> list[torch.Tensor]:
        """Returns the resampler's attention (Q, patches); see `Family.query_attention`."""
        tower = network_of(model).transformer.visual
        resampler = tower.attn_pool
        maps = []
        for pixels in normalize_pixels(vision["pixel_values"]).split(1):  # all would take memory
            with no_autocast(pixels.device):
                query_QD, key_NPD, _ = resampler.attention_inputs(tower.encode_patches(pixels))
                maps.append(resampler.attn.weights(query_QD, key_NPD)[0].mean(0))
        return maps

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> float:
        """Returns the floating-point operations of a training step; see `Family.flops`."""
        return training_flops(
            self.config,
            lengths=batch.lengths,
            images=len(batch.vision.get("pixel_values", ())),
            targets=len(batch.target_positions),
            trained=trained,
        )

    def answering_memory(
        self, *, rows: int, tokens: int, image_tokens: int, new_tokens: int, at_once: bool
    ) -> int:
        """Returns the bytes that answering a batch takes; see `Family.answering_memory`."""
        images = self._images_of(image_tokens)
        sizes = {"rows": rows, "tokens": tokens, "images": images, "new_tokens": new_tokens}
        return answering_bytes(self.config, self.dtype.itemsize, **sizes, at_once=at_once)

    def loss_memory(self, *, rows: int, tokens: int, image_tokens: int, supervised: int) -> int:
        """Returns the bytes that the loss of a batch takes; see `Family.loss_memory`."""
        images = self._images_of(image_tokens)
        sizes = {"rows": rows, "tokens": tokens, "images": images, "supervised": supervised}
        return loss_bytes(self.config, self.dtype.itemsize, **sizes)

    def _images_of(self, image_tokens: int) -> int:
        return image_tokens // self.config.n_queries if image_tokens else 0

    def base_reader(self, device: torch.device | str = "cpu") -> Read:
        """Returns a function that reads the base weights; see `Family.base_reader`."""
        if self.random:
            state = self.load(device).state_dict()
            return lambda name: state[name].cpu()
        return reader(self.checkpoint_tensors(), self.dtype)

    def export(self, read: Read, folder: Path, *, dtype: torch.dtype) -> None:
        """Writes a full model, a shard at a time; see `Family.export`."""
        shapes = file_shapes(self.meta_model())
        check_disk(folder, shapes, dtype)
        try:
            write_weights(read, shapes, folder, dtype=dtype)
        finally:
            open_shard.cache_clear()
        write_companions(
            folder,
            self.config,
            dtype=str(dtype).removeprefix("torch."),
            vocabulary=self.tokenizer.path,
            base=None if self.random else self.folder,
            template=self.template,
        )

    def adapter_caveats(self, tensors: Iterable[str]) -> list[str]:
        """Returns what limits the use of an exported adapter; see `Family.adapter_caveats`."""
        layers = set()
        for name in tensors:
            if layer := RESAMPLER_ATTENTION.search(name):
                layers.add(layer[1])
        if not layers:
            return []
        return [
            f"the adapters on {', '.join(sorted(layers))} work here only: the resampler of the "
            f"original code reads the weight of out_proj directly and has no q_proj, k_proj and "
            f"v_proj; for other programs export a merged model, with merge=true"
        ]
