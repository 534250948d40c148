"""Loads, quantizes, distributes and draws the weights of a network, for any family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from qwenvl_lit.models.gptq import PackedWeight
from qwenvl_lit.models.quantization import bnb_config
from qwenvl_lit.models.stored_tensors import open_shard
from qwenvl_lit.stored_files import check_finite

# Networks below this size are initialized on the CPU, so that their weights depend on the seed
# alone; the weights of larger ones also depend on the device.
LARGE = 1e9  # parameters


class LoadsWeights(ABC):
    """The part of a family that loads its network."""

    components: ClassVar[Mapping[str, str]]
    random: bool
    """Whether weights are drawn, not read from `folder`."""
    folder: Path | None
    config: PreTrainedConfig
    generation: GenerationConfig
    dtype: torch.dtype
    device_map: str | Mapping[str, Any] | None
    max_memory: Mapping[int | str, str] | None
    seed: int

    @property
    @abstractmethod
    def network_class(self) -> type[PreTrainedModel]:
        """The class of the network."""

    @abstractmethod
    def meta_model(self) -> PreTrainedModel:
        """Returns the network on the meta device: names, shapes and dtypes without weights."""

    @abstractmethod
    def checkpoint_tensors(self) -> Mapping[str, Any]:
        """Returns the tensors of the checkpoint by their names in files, read when needed."""

    def load(
        self, device: torch.device | str = "cpu", *, quantization: Mapping[str, Any] | None = None
    ) -> Any:
        """Returns the network in evaluation mode on `device`, or distributed by `device_map`.

        Tensors are moved one by one, and quantized on the way.

        Args:
            quantization: settings of `BitsAndBytesConfig` for the linear layers except the head.

        Raises:
            DataError: the checkpoint's tensors do not match its config, or are not finite.
        """
        if self.random:
            model = self.random_model(torch.device(device))
            return self.quantize(model, device, quantization) if quantization else model
        try:
            tensors = self.checkpoint_tensors()
            if self.device_map is None:
                model = self._from_tensors(tensors, device, quantization)
            else:
                model = self._distributed(tensors, quantization)
        finally:
            open_shard.cache_clear()  # it keeps the last files mapped
        model.generation_config = self.generation
        return model.eval()

    def quantize(
        self, model: PreTrainedModel, device: torch.device | str, quantization: Mapping[str, Any]
    ) -> Any:
        """Returns a quantized network with the weights of `model`, which may be on any device."""
        quantized = self._from_tensors(model.state_dict(), device, quantization)
        quantized.generation_config = model.generation_config
        return quantized.eval()

    def random_model(self, device: torch.device) -> PreTrainedModel:
        """Returns an untrained network in evaluation mode."""
        if self.meta_model().num_parameters() < LARGE:
            made_on, made_in = torch.device("cpu"), torch.float32
        else:
            made_on, made_in = device, self.dtype  # a second, float32 copy would not fit
        on_gpu = made_on.type == "cuda"
        with torch.random.fork_rng(devices=[made_on] if on_gpu else []), made_on:
            generator = torch.default_generator
            if on_gpu:  # read here: there are none before `fork_rng` has initialized CUDA
                generator = torch.cuda.default_generators[made_on.index or 0]
            generator.manual_seed(self.seed)
            model = self.network_class._from_config(self.config, dtype=made_in)
        return model.to(device=device, dtype=self.dtype).eval()

    def _from_tensors(
        self,
        tensors: Mapping[str, Any],
        device: torch.device | str,
        quantization: Mapping[str, Any] | None,
    ) -> PreTrainedModel:
        return self.network_class.from_pretrained(
            None,
            state_dict=tensors,
            device_map={"": device},
            config=self.config,
            dtype=self.dtype,
            quantization_config=self._bnb_config(quantization),
        )

    def _distributed(
        self, tensors: Mapping[str, Any], quantization: Mapping[str, Any] | None
    ) -> PreTrainedModel:
        # Tensors that stay on disk are read from the folder, unless they are packed there.
        is_packed = any(isinstance(tensor, PackedWeight) for tensor in tensors.values())
        offload_folder = TemporaryDirectory()  # for what fits neither on GPUs nor in host memory
        model = self.network_class.from_pretrained(
            None if is_packed else self.folder,
            state_dict=tensors if is_packed else None,
            config=self.config,
            dtype=self.dtype,
            device_map=self.device_map,
            max_memory=self.max_memory,
            offload_folder=offload_folder.name,
            quantization_config=self._bnb_config(quantization),
        )
        model.offload_folder = offload_folder  # deleted with the model
        for name, tensor in model.named_parameters():
            if not tensor.is_meta:  # what is offloaded to disk is read when it is used
                check_finite(self.folder, name, tensor)
        return model

    def _bnb_config(self, quantization: Mapping[str, Any] | None) -> BitsAndBytesConfig | None:
        if not quantization:
            return None
        return bnb_config(quantization, dtype=self.dtype, skip=[self.components["head"]])


def check_source(path: str | None, config: Any, weights: str) -> None:
    """Raises ValueError unless a family has one source of weights: a checkpoint, or a config."""
    if path is None and config is None:
        raise ValueError("a model needs a `path`, or a `config` for random weights")
    if path is not None and config is not None:
        raise ValueError(
            f"a model has either a `path`, or a `config` for random weights: for the weights "
            f"of {path}, choose a model= without config, give ckpt=FOLDER in place of "
            f"model=, or add model.config=null"
        )
    if weights not in ("checkpoint", "random"):
        raise ValueError(f"weights is checkpoint or random, got {weights!r}")


def float_dtype(name: str) -> torch.dtype:
    """Returns the floating-point type of torch with this name.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype is torch's name of a floating-point type, as float32 or bfloat16, got {name!r}"
        )
    return dtype


def device_named(name: torch.device | str | None) -> torch.device:
    """The device of that name; for None the first GPU if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such name, or the GPU does not exist here.
    """
    try:
        device = torch.device(name or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device is a torch device such as cpu or cuda:0, got {name!r}") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device={name}: torch {torch.__version__} sees {count} GPUs here; "
            f"leave device out to take what there is"
        )
    return device
