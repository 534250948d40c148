"""The seam between model families and everything that trains, evaluates and runs them.

A new family is a folder beside `qwen_vl`, whose classes have these members, and a yaml file in
`conf/model/`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qwenvl_lit.types import Batch, Conversation, ImageSource, Prediction, Sample

# B rows, T tokens of a row, N images, Q tokens of an image, D model width


class FeatureSource(Protocol):
    """Vision features that are known before a batch is formed, for example a vision cache."""

    def __call__(self, images: Sequence[ImageSource]) -> torch.Tensor | None:
        """Returns the features (N, Q, D) of `images`, or None while the source has none.

        `Processor.encode` puts the features into a sample in place of pixels. After None it decodes
        the images.
        """
        ...


class Processor(Protocol):
    """Converts conversations to tensors, and generated token ids to text and boxes.

    A processor holds no weights, so that it is cheap to copy into data workers.
    """

    pad_id: int
    stop_ids: tuple[int, ...]
    """An answer ends before the first of these."""
    supports_packing: bool
    """As `Family.supports_packing`."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain data that determines ids and labels.

        Two processors with equal settings encode every conversation to the same ids and labels.
        """
        ...

    @property
    def image_settings(self) -> Mapping[str, Any]:
        """Plain data that determines the result of `pixels`."""
        ...

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Returns the ids, labels and images of a conversation.

        Args:
            prompt: leave out the answer and open a turn of the assistant.

        Raises:
            Dropped: the sample is too long, and the config says to drop such rows.
            DataError: an image cannot be read, a box refers to an image that does not exist, or the
                sample is too long.
        """
        ...

    def length(self, conversation: Conversation, *, prompt: bool = False) -> tuple[int, int]:
        """Returns the number of tokens and of supervised tokens that `encode` would give.

        No image is decoded.

        Raises:
            DataError: as `encode`, except for images that cannot be decoded.
        """
        ...

    def pixels(self, image: ImageSource) -> torch.Tensor:
        """Returns an image as `Family.image_features` takes it; the shape is the same for all.

        Raises:
            BadImage: the image cannot be decoded.
        """
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Returns ids as text to be read by people; special tokens appear as their names."""
        ...

    def decode(self, ids: Sequence[int], conversation: Conversation) -> Prediction:
        """Converts generated ids, without the prompt, to a prediction.

        Boxes of the prediction are in pixels of the conversation's images.
        """
        ...

    def read(self, text: str, conversation: Conversation) -> Prediction:
        """Converts the text of an answer to the prediction that `decode` gives with this text."""
        ...

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Returns the ids of each option of a multiple-choice conversation.

        They are tokenized as they would follow the prompt, and have no end-of-turn token.
        """
        ...


class Family(Protocol):
    """One kind of model: how to build its network and processor, and how they fit together.

    The blocks of the network are transformers' `GradientCheckpointingLayer`s. Their `forward` calls
    a method `compute`, which `speed` compiles.
    """

    components: Mapping[str, str]
    """Module paths of "vision", "resampler", "language", "embeddings" and "head"."""
    lora_targets: Mapping[str, str]
    """Named groups of linear layers for adapters: regular expressions that match module paths."""
    quantization: Mapping[str, Any] | None
    """Default of `load(quantization=)`. An adapter trained on a quantized base overrides it."""
    supports_packing: bool
    """True if several samples may share a row, separated by positions that start again at 0."""
    fsdp_units: Collection[str]
    """Class names of the modules whose weights FSDP gathers together, such as blocks."""
    machine_settings: Sequence[str]
    """Constructor arguments that depend on the machine, and are no property of a trained model."""
    base_settings: Sequence[str]
    """Constructor arguments that choose the base weights; an exported model has its own weights."""

    def processor(self, features: FeatureSource | None = None) -> Processor:
        """Returns a processor.

        Args:
            features: where samples get vision features from, in place of pixels.
        """
        ...

    def meta_model(self) -> PreTrainedModel:
        """Returns the network on the meta device: names, shapes and dtypes without weights."""
        ...

    def load(
        self, device: torch.device | str = "cpu", *, quantization: Mapping[str, Any] | None = None
    ) -> PreTrainedModel:
        """Returns the network with its base weights on `device`, in evaluation mode.

        Args:
            quantization: settings of `BitsAndBytesConfig` for the linear layers; None: keep the
                weights unquantized.
        """
        ...

    def quantized(
        self, model: PreTrainedModel, device: torch.device | str, quantization: Mapping[str, Any]
    ) -> PreTrainedModel:
        """Returns what `load` would return if the base weights were those of `model`."""
        ...

    def inputs(self, batch: Batch, *, generate: bool = False) -> dict[str, Any]:
        """Returns the arguments of the network's `forward`, or of `generate`, for a batch."""
        ...

    def image_features(self, model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the features (N, Q, D) of N images from `Processor.pixels`.

        They hold everything that the vision tower and the resampler of `model` pass on to the rest
        of it; a batch that has them needs no pixels. `model` may be wrapped by adapters.
        """
        ...

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> float:
        """Returns the floating-point operations of a training step on `batch`, without padding.

        Args:
            trained: for each component, the share of its parameters that is trained.
        """
        ...

    def base_reader(self, device: torch.device | str = "cpu") -> Callable[[str], torch.Tensor]:
        """Returns a function that reads a base weight into host memory, by its name in the network.

        Weights of a checkpoint are read when they are asked for, and few are in memory at once.

        Args:
            device: where random weights are made.
        """
        ...

    def export(
        self, read: Callable[[str], torch.Tensor], folder: Path, *, dtype: torch.dtype
    ) -> None:
        """Writes a whole model into a folder, in the layout in which the family is published.

        Args:
            read: returns a weight by its name in the network.

        Raises:
            DataError: the disk is too small.
        """
        ...

    def adapter_caveats(self, tensors: Iterable[str]) -> list[str]:
        """Returns sentences about what limits the use of an exported adapter elsewhere.

        Args:
            tensors: the names of the adapter's tensors.
        """
        ...
