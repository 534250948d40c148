"""The seam for other models: a new family is one file beside this one and one yaml in `conf/model/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qwenvl_lit.types import Batch, Conversation, ImageSource, Prediction, Sample


class Processor(Protocol):
    """Text and images to tensors and back. Cheap to copy into data workers: it holds no weights."""

    pad_id: int
    stop_ids: tuple[int, ...]  # an answer ends before the first of these
    features: (
        Callable[[Sequence[ImageSource]], torch.Tensor] | None
    )  # (N, Q, D) of images, which `encode` then gives in place of pixels

    @property
    def image_settings(self) -> Mapping[str, Any]:
        """What decides `pixels`, as plain data."""
        ...

    def pixels(self, image: ImageSource) -> torch.Tensor:
        """An image as `Family.image_features` takes it, of the same shape for all; raises BadImage if it cannot be decoded."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides ids and labels, as plain data: two processors with equal settings encode alike."""
        ...

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Ids and labels in one pass; `prompt` leaves the answer out and opens the assistant's turn.

        Raises:
            DataError: an image is unreadable, a box names an image that does not exist, or the sample is too long.
        """
        ...

    def length(self, conversation: Conversation, *, prompt: bool = False) -> tuple[int, int]:
        """Tokens of `encode(conversation, prompt=prompt)` and how many are learned, without decoding an image; raises as `encode`."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text for people, special tokens by their names."""
        ...

    def decode(self, ids: Sequence[int], conversation: Conversation) -> Prediction:
        """Generated ids (without the prompt) to text, boxes in pixels of the conversation's images."""
        ...

    def read(self, text: str, conversation: Conversation) -> Prediction:
        """The answer that `decode` gave with this text."""
        ...

    def option_ids(self, conversation: Conversation) -> list[list[int]]:
        """Ids of each of the conversation's options, as they follow its prompt, without an end mark."""
        ...


class Family(Protocol):
    """One kind of model. The blocks of its network are transformers' `GradientCheckpointingLayer`s, whose `forward` calls `compute`, which
    `speed` compiles."""

    components: Mapping[
        str, str
    ]  # "vision" | "resampler" | "language" | "embeddings" | "head" -> module path
    quantization: (
        Mapping[str, Any] | None
    )  # what `load` is to be given, unless an adapter has been learned over other bits
    supports_packing: bool  # may several samples share a row, told apart by restarting positions?

    def processor(self) -> Processor: ...

    def meta_model(self) -> PreTrainedModel:
        """The network on the meta device: names, shapes and types, without weights."""
        ...

    def load(
        self, device: torch.device | str = "cpu", *, quantization: Mapping[str, Any] | None = None
    ) -> PreTrainedModel:
        """The network with its base weights, in evaluation mode on `device`.

        Args:
            quantization: settings of `BitsAndBytesConfig` for its linear layers; None: as they are.
        """
        ...

    def quantized(
        self, model: PreTrainedModel, device: torch.device | str, quantization: Mapping[str, Any]
    ) -> PreTrainedModel:
        """What `load` would give, had it found the weights that `model` has."""
        ...

    def inputs(self, batch: Batch, *, generate: bool = False) -> dict[str, Any]:
        """Keyword arguments of the model's `forward` for a batch, or of its `generate`."""
        ...

    def image_features(self, model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        """Features (N, Q, D) of N images from `Processor.pixels`: all that the "vision" and "resampler" of `model`, which may be inside
        adapters, tell the rest of it. `Processor.features` gives them to batches, and then `inputs` needs no pixels."""
        ...

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> float:
        """Operations of a training step on `batch`, padding left out; `trained` is the share of each part's numbers that is trained."""
        ...
