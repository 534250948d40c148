"""Qwen2.5-VL and Qwen3-VL: from a checkpoint, or with random weights of any size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from qwenvl_lit.bounds import check_number
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.chat_processor import TooLong
from qwenvl_lit.models.chatml import Supervise
from qwenvl_lit.models.checkpoint_files import CONFIG, read_generation_config
from qwenvl_lit.models.loading import LoadsWeights, check_source, float_dtype
from qwenvl_lit.models.protocols import FeatureSource
from qwenvl_lit.models.quantization import NF4
from qwenvl_lit.models.qwen3_vl.checkpoint import (
    find_checkpoint,
    opens_thoughts,
    read_image_processor,
    read_network_config,
    stored_tensors,
)
from qwenvl_lit.models.qwen3_vl.config import CONFIGS, GENERATION, TOKEN_IDS, published_config
from qwenvl_lit.models.qwen3_vl.export import write_companions, write_weights
from qwenvl_lit.models.qwen3_vl.flops import training_flops
from qwenvl_lit.models.qwen3_vl.images import ImageProcessor, normalize_patches
from qwenvl_lit.models.qwen3_vl.inputs import forward_inputs
from qwenvl_lit.models.qwen3_vl.memory import answering_bytes, loss_bytes
from qwenvl_lit.models.qwen3_vl.network import NETWORKS, image_features
from qwenvl_lit.models.qwen3_vl.processor import Qwen3VLProcessor, Think
from qwenvl_lit.models.qwen3_vl.tokenizer import TOKENIZER, Qwen2Tokenizer
from qwenvl_lit.models.stored_tensors import StoredTensor, open_shard
from qwenvl_lit.models.weight_files import Read, stored_reader
from qwenvl_lit.settings import BoxForm
from qwenvl_lit.stored_files import errors_named
from qwenvl_lit.types import Batch, DataError

BLOCK = r"model\.language_model\.layers\.\d+"


class Qwen3VLFamily(LoadsWeights):
    """Builds the network and the processor of Qwen2.5-VL or Qwen3-VL, as `model_type` says.

    Args:
        path: folder of a checkpoint, or its name on the hub; None: random weights.
        weights: "checkpoint"; or "random", an untrained network of the size of `path` (that of the
            folder, else that published under this name), for tests and measurements.
        config: content of a `config.json`, for random weights without `path`. The size of the
            vocabulary and the ids of its tokens follow from the vocabulary.
        vocabulary: a `tokenizer.json` or a folder that has one, a file in tiktoken's format, or
            "tiny" for that of the demo; None: the checkpoint's `tokenizer.json`.
        download: whether a hub name may be fetched.
        device_map, max_memory: how transformers distributes the network over GPUs and host memory,
            for example "auto" and {0: "10GiB"}; for inference only. None: all of it on one device.
        system, supervise, max_length, too_long, special_tokens, boxes: see `ChatProcessor`.
        think: see `Qwen3VLProcessor`.
        min_pixels, max_pixels: images with fewer or more pixels are scaled; None: as the
            checkpoint's `preprocessor_config.json` says.
        dtype: of the weights, as torch names it.
        load_in_4bit: quantize the linear layers except the head, those of the vision tower
            included, for inference. To train over 4-bit weights, use an adapter that says so.
        seed: of random weights.
    """

    components: Mapping[str, str] = {
        "vision": "model.visual",
        "resampler": "model.visual.merger",
        "language": "model.language_model",
        "embeddings": "model.language_model.embed_tokens",
        "head": "lm_head",
    }
    lora_targets: Mapping[str, str] = {
        "attention": rf"{BLOCK}\.self_attn\.[qkvo]_proj",
        "language": rf"{BLOCK}\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    }
    machine_settings = ("device_map", "max_memory", "download", "load_in_4bit")
    base_settings = ("path", "config", "weights", "vocabulary", "seed")
    supports_packing = True
    supports_vision_cache = True
    fixed_image_size = False
    fsdp_units = (
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLVisionBlock",
        "Qwen2_5_VLPatchMerger",
        "Qwen3VLTextDecoderLayer",
        "Qwen3VLVisionBlock",
        "Qwen3VLVisionPatchMerger",
    )

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
        system: str | None = None,
        supervise: Supervise = "answers",
        think: Think = "supervise",
        max_length: int | None = None,
        too_long: TooLong = "error",
        special_tokens: Sequence[str] | None = None,
        boxes: BoxForm | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        dtype: str = "float32",
        load_in_4bit: bool = False,
        seed: int = 0,
    ):
        check_source(path, config, weights)
        check_number("model.seed", seed, least=0, most=2**63 - 1, whole=True)
        check_number("model.min_pixels", min_pixels, least=1, whole=True, optional=True)
        check_number("model.max_pixels", max_pixels, least=1, whole=True, optional=True)
        self.random = weights == "random" or path is None
        if self.random and device_map is not None:
            raise ValueError("device_map is for checkpoints; random weights are made on one device")
        if path is None and vocabulary is None:
            raise ValueError('random weights need a `vocabulary`: a file, or "tiny"')
        if config is not None and config.get("model_type") not in CONFIGS:
            raise ValueError(f"model.config.model_type is one of {', '.join(CONFIGS)}")
        self.path = path
        self.sizes = dict(config or {})
        self.vocabulary = vocabulary
        self.download = download
        self.device_map = device_map
        self.max_memory = max_memory
        self.system = system
        self.supervise = supervise
        self.think = think
        self.max_length = max_length
        self.too_long = too_long
        self.special_tokens = special_tokens
        self.boxes: BoxForm | None = boxes
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.dtype = float_dtype(dtype)
        self.quantization = NF4 if load_in_4bit else None
        self.seed = seed

    @cached_property
    def folder(self) -> Path | None:
        """The folder of the checkpoint, fetched if necessary; None: there is only a config."""
        if not self.random:
            options: Any = {"download": self.download, "vocabulary": self.vocabulary}
            return find_checkpoint(str(self.path), **options)
        if self.path and Path(self.path).expanduser().is_dir():
            return Path(self.path).expanduser()
        return None

    @cached_property
    def tokenizer(self) -> Qwen2Tokenizer:
        think = self._stored_config.model_type == "qwen3_vl"
        if self.vocabulary == "tiny":
            return Qwen2Tokenizer(TINY_VOCABULARY, think=think)
        if self.vocabulary is not None:
            file = Path(self.vocabulary).expanduser()
            return Qwen2Tokenizer(file / TOKENIZER if file.is_dir() else file, think=think)
        if self.folder is None:
            raise ValueError(
                f"random weights of {self.path} come without a vocabulary: give "
                f"model.vocabulary=FILE, a copy of its {TOKENIZER}, or model.vocabulary=tiny, "
                f"which splits words into more tokens"
            )
        return Qwen2Tokenizer(self.folder / TOKENIZER)

    @cached_property
    def _stored_config(self) -> PreTrainedConfig:
        """The config of the network, before the ids of its tokens are known."""
        if self.folder is not None:
            return read_network_config(self.folder)
        sizes = self.sizes if self.path is None else published_config(self.path)
        try:
            return CONFIGS[sizes["model_type"]].from_dict(sizes)
        except Exception as error:  # the checks of configs raise errors of many kinds
            raise ValueError(f"model.config: {' '.join(str(error).split())}") from error

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the network.

        Raises:
            DataError: the vocabulary is not that of the checkpoint.
        """
        config, tokenizer = self._stored_config, self.tokenizer
        ids = {field: tokenizer.special[name] for field, name in TOKEN_IDS.items()}
        if self.random:
            for field, token_id in ids.items():
                setattr(config, field, token_id)
            if getattr(config.text_config, "eos_token_id", None) is not None:
                config.text_config.bos_token_id = tokenizer.pad_id
                config.text_config.eos_token_id = tokenizer.im_end_id
            if self.path is None:
                config.text_config.vocab_size = -(-tokenizer.vocab_size // 16) * 16
        for field, token_id in ids.items():
            if getattr(config, field) != token_id:
                raise DataError(
                    f"{TOKEN_IDS[field]} is {token_id} in {tokenizer.path}, but {field} of the "
                    f"model's config is {getattr(config, field)}; choose the vocabulary of this "
                    f"model"
                )
        if config.text_config.vocab_size < tokenizer.vocab_size:
            raise DataError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model has embeddings "
                f"of {config.text_config.vocab_size}; choose the vocabulary of this model"
            )
        return config

    @cached_property
    def generation(self) -> GenerationConfig:
        """The checkpoint's `generation_config.json`, else the published settings."""
        if self.folder is not None and not self.random:
            return read_generation_config(self.folder)
        tokenizer = self.tokenizer
        return GenerationConfig(
            **GENERATION[self.config.model_type],
            eos_token_id=[tokenizer.im_end_id, tokenizer.pad_id],
            pad_token_id=tokenizer.pad_id,
        )

    @cached_property
    def images(self) -> ImageProcessor:
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return read_image_processor(self.folder, self.config, **limits)

    @property
    def thinks(self) -> bool:
        """Whether the model is one of the Thinking checkpoints, or trained from one."""
        if self.folder is not None:
            return opens_thoughts(self.folder)
        return PurePath(self.path or "").name.endswith("-Thinking")

    @property
    def max_tokens(self) -> int:
        """The most tokens of a prompt together with its answer."""
        return self.config.text_config.max_position_embeddings

    def processor(self, features: FeatureSource | None = None) -> Qwen3VLProcessor:
        """Returns a processor; see `Family.processor`."""
        return Qwen3VLProcessor(
            self.tokenizer,
            self.images,
            self.config.vision_config,
            scaling="pixels" if self.config.model_type == "qwen2_5_vl" else "thousandths",
            thinks=self.thinks,
            think=self.think,
            system=self.system,
            supervise=self.supervise,
            max_length=self.max_length,
            too_long=self.too_long,
            special_tokens=self.special_tokens,
            boxes=self.boxes,
            features=features,
        )

    def meta_model(self) -> PreTrainedModel:
        """Returns the network on the meta device: names, shapes and dtypes without weights."""
        with torch.device("meta"):
            if self.folder is None:
                return self.network_class(self.config).to(self.dtype)
            with errors_named(self.folder / CONFIG):
                return self.network_class(self.config).to(self.dtype)

    @property
    def network_class(self) -> type[PreTrainedModel]:
        return NETWORKS[self.config.model_type]

    def checkpoint_tensors(self) -> Mapping[str, StoredTensor]:
        """Returns the tensors of the checkpoint; see `LoadsWeights.checkpoint_tensors`."""
        assert self.folder is not None
        return stored_tensors(self.folder, self.meta_model())

    def random_model(self, device: torch.device) -> PreTrainedModel:
        """Returns an untrained network, with the published settings of generation."""
        model = super().random_model(device)
        model.generation_config = self.generation
        return model

    def inputs(self, batch: Batch, *, generate: bool = False) -> dict[str, Any]:
        """Returns arguments of `forward`, or of `generate`; see `forward_inputs`."""
        return self._with_pixels(forward_inputs(batch, generate=generate))

    def image_features(self, model: nn.Module, vision: Mapping[str, Any]) -> list[torch.Tensor]:
        """Returns the features (Q, (1 + L) * D) of each image; see `Family.image_features`."""
        return image_features(model, self._with_pixels(vision))

    def image_grids(self, vision: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Returns the rows and columns of the tokens of each image; see `Family.image_grids`."""
        merge = self.config.vision_config.spatial_merge_size
        return [(height // merge, width // merge) for height, width in vision["image_sizes"]]

    def query_attention(self, model: nn.Module, vision: Mapping[str, Any]) -> None:
        """Returns None: each token has a place of its own in the image."""

    def _with_pixels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `inputs` with normalized pixels in place of patches from data workers."""
        inputs = dict(inputs)
        patches = inputs.get("pixel_values")
        if patches is not None and patches.dtype == torch.uint8:
            images = self.images
            inputs["pixel_values"] = normalize_patches(patches, images.mean, images.std)
        return inputs

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> float:
        """Returns the floating-point operations of a training step; see `Family.flops`."""
        return training_flops(
            self.config,
            lengths=batch.lengths,
            image_sizes=batch.vision.get("image_sizes", ()),
            targets=len(batch.target_positions),
            trained=trained,
        )

    def answering_memory(
        self, *, rows: int, tokens: int, image_tokens: int, new_tokens: int, at_once: bool
    ) -> int:
        """Returns the bytes that answering a batch takes; see `Family.answering_memory`."""
        sizes = {"rows": rows, "tokens": tokens, "image_tokens": image_tokens}
        itemsize = self.dtype.itemsize
        return answering_bytes(
            self.config, itemsize, **sizes, new_tokens=new_tokens, at_once=at_once
        )

    def loss_memory(self, *, rows: int, tokens: int, image_tokens: int, supervised: int) -> int:
        """Returns the bytes that the loss of a batch takes; see `Family.loss_memory`."""
        sizes = {"rows": rows, "tokens": tokens, "image_tokens": image_tokens}
        return loss_bytes(self.config, self.dtype.itemsize, **sizes, supervised=supervised)

    def base_reader(self, device: torch.device | str = "cpu") -> Read:
        """Returns a function that reads the base weights; see `Family.base_reader`."""
        if self.random:
            state = self.load(device).state_dict()
            return lambda name: state[name].cpu()
        return stored_reader(self.checkpoint_tensors(), self.dtype)

    def export(self, read: Read, folder: Path, *, dtype: torch.dtype) -> None:
        """Writes a full model, a shard at a time; see `Family.export`."""
        try:
            write_weights(read, self.meta_model(), folder, dtype=dtype)
        finally:
            open_shard.cache_clear()
        base = None if self.random else self.folder
        write_companions(folder, self.config, self.processor(), dtype=dtype, base=base)

    def adapter_caveats(self, tensors: Iterable[str]) -> list[str]:
        """Returns what limits the use of an exported adapter: nothing, with the same modules."""
        return []
