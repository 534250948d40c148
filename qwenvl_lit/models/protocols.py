"""The interface between model families and the code that trains, evaluates and runs models.

To add a family, add a folder beside `qwen_vl` with classes that have these members, and a yaml file
in `conf/model/`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qwenvl_lit.types import Batch, Conversation, ImageSource, Prediction, Sample

# B batch size, T tokens of a row, N images, Q tokens of an image, D model width


class FeatureSource(Protocol):
    """A source of vision features that were computed before, such as a vision cache."""

    def __call__(self, images: Sequence[ImageSource]) -> torch.Tensor | None:
        """Returns the features (N, Q, D) of `images`, or None as long as the source is not ready.

        `Processor.encode` puts the features into a sample in place of pixels. If the source returns
        None, `encode` decodes the images.
        """
        ...


class Processor(Protocol):
    """Converts conversations to tensors, and generated token ids to text and boxes.

    A processor has no weights. Copying it into data workers is therefore cheap.
    """

    pad_id: int
    stop_ids: tuple[int, ...]
    """Token ids that end an answer. The answer does not include them."""
    max_length: int | None
    """The most tokens of a training sample; None: no limit."""
    supports_packing: bool
    """The value of `Family.supports_packing`."""
    special_tokens: tuple[str, ...]
    """Names of special tokens that text may hold."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain data that determines token ids and labels.

        Two processors with equal settings encode every conversation to the same ids and labels.
        """
        ...

    @property
    def image_settings(self) -> Mapping[str, Any]:
        """Plain data that determines the results of `pixels`."""
        ...

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Returns the token ids, labels and images of a conversation.

        Args:
            prompt: whether to leave out the answer and begin a turn of the assistant in its place.

        Raises:
            Dropped: the sample is too long, and the processor is configured to drop such rows.
            DataError: an image cannot be read, a box refers to an image that does not exist, or the
                sample is too long.
        """
        ...

    def length(self, conversation: Conversation, *, prompt: bool = False) -> tuple[int, int]:
        """Returns the numbers of tokens and of supervised tokens of the sample `encode` returns.

        Does not decode any image.

        Raises:
            DataError: for the same reasons as `encode`, except images that cannot be decoded.
        """
        ...

    def pixels(self, image: ImageSource) -> torch.Tensor:
        """Returns an image as input of `Family.image_features`. All images have the same shape.

        Raises:
            BadImage: the image cannot be decoded.
        """
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Returns token ids as text for people, in which special tokens are shown by name."""
        ...

    def decode(self, ids: Sequence[int], conversation: Conversation) -> Prediction:
        """Converts generated token ids, without those of the prompt, to a prediction.

        Boxes of the prediction are in pixels of the conversation's images.
        """
        ...

    def read(self, text: str, conversation: Conversation) -> Prediction:
        """Converts the text of an answer to a prediction, as `decode` does after decoding ids."""
        ...

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Returns the token ids of each option of a multiple-choice conversation.

        The ids are those of the option as an answer to the prompt, without the end-of-turn token.
        """
        ...


class Family(Protocol):
    """A model architecture: builds its network and its processor, and connects the two.

    The blocks of the network are subclasses of transformers' `GradientCheckpointingLayer`. Their
    `forward` calls a method `compute`, which `training.speed` may compile.
    """

    components: Mapping[str, str]
    """Module paths of "vision", "resampler", "language", "embeddings" and "head"."""
    lora_targets: Mapping[str, str]
    """Groups of linear layers for adapters, each a regular expression that matches module paths."""
    dtype: torch.dtype
    """The dtype of the base weights."""

    quantization: Mapping[str, Any] | None
    """Quantization of the base weights, unless the adapter requires its own quantization."""
    supports_packing: bool
    """Whether a row may contain several samples whose positions each start at 0."""
    fsdp_units: Collection[str]
    """Class names of modules, such as blocks, whose weights FSDP gathers as a unit."""
    machine_settings: Sequence[str]
    """Constructor arguments that depend on the machine and are not properties of a model."""
    base_settings: Sequence[str]
    """Constructor arguments that choose the base weights. An exported model does not need them."""

    def processor(self, features: FeatureSource | None = None) -> Processor:
        """Returns a processor.

        Args:
            features: a source of vision features, which replace pixels in samples.
        """
        ...

    def meta_model(self) -> PreTrainedModel:
        """Returns the network on the meta device, with names, shapes and dtypes but no weights."""
        ...

    def load(
        self, device: torch.device | str = "cpu", *, quantization: Mapping[str, Any] | None = None
    ) -> PreTrainedModel:
        """Returns the network with its base weights on `device`, in evaluation mode.

        Args:
            quantization: settings of `BitsAndBytesConfig` for the linear layers. With None, the
                weights are not quantized.
        """
        ...

    def quantize(
        self, model: PreTrainedModel, device: torch.device | str, quantization: Mapping[str, Any]
    ) -> PreTrainedModel:
        """Returns the result of `load` with the weights of `model` in place of the base weights."""
        ...

    def inputs(self, batch: Batch, *, generate: bool = False) -> dict[str, Any]:
        """Returns the arguments of the network's `forward`, or of its `generate`, for a batch."""
        ...

    def image_features(self, model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the features (N, Q, D) of N images from `Processor.pixels`.

        The features are the complete output of the vision tower and the resampler of `model`. A
        batch that has features needs no pixels. `model` may be wrapped by adapters.
        """
        ...

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> float:
        """Returns the FLOPs of a training step on `batch`, not counting padding.

        Args:
            trained: the fraction of the parameters that is trained, by component.
        """
        ...

    def answering_memory(
        self, *, rows: int, tokens: int, images: int, new_tokens: int, at_once: bool
    ) -> int:
        """Returns the bytes that answering a batch takes in addition to the weights, roughly.

        Args:
            rows: number of rows, times the number of beams.
            tokens, images, new_tokens: upper bounds per row: tokens and images of the prompt, and
                tokens of the answer.
            at_once: whether all prompts are read in one pass.
        """
        ...

    def loss_memory(self, *, rows: int, tokens: int, images: int, supervised: int) -> int:
        """Returns the bytes that the loss of a batch takes without gradients, roughly.

        Args:
            tokens, images, supervised: upper bounds per row.
        """
        ...

    def base_reader(self, device: torch.device | str = "cpu") -> Callable[[str], torch.Tensor]:
        """Returns a function that reads a base weight into host memory by its name in the network.

        The function reads weights from disk when it is called, so that few of them are in memory at
        the same time.

        Args:
            device: the device on which random weights are generated if there is no checkpoint.
        """
        ...

    def export(
        self, read: Callable[[str], torch.Tensor], folder: Path, *, dtype: torch.dtype
    ) -> None:
        """Writes a merged model to a folder, in the format of the family's published checkpoints.

        Args:
            read: a function that returns a weight by its name in the network.

        Raises:
            DataError: the disk does not have enough free space.
        """
        ...

    def adapter_caveats(self, tensors: Iterable[str]) -> list[str]:
        """Returns warnings about using an exported adapter with other software.

        Args:
            tensors: the names of the adapter's tensors.
        """
        ...
