"""The interface between model families and the code that trains, evaluates and runs models.

To add a family, add a folder beside `qwen_vl` with classes that have these members, and a yaml file
in `conf/model/`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qwenvl_lit.models.passes import ShowHeads
    from qwenvl_lit.types import Batch, Conversation, ImageSource, Length, Prediction, Sample

# B batch size, T tokens of a row, N images, Q tokens of an image, D width of its features, n rows
# that are answered, b prompts that are read together, S supervised tokens, V vocabulary size


class FeatureSource(Protocol):
    """A source of vision features that were computed before, such as a vision cache."""

    def __call__(self, images: Sequence[ImageSource]) -> list[torch.Tensor] | None:
        """Returns the features (Q, D) of each image, or None as long as the source is not ready.

        Q may differ. `Processor.encode` puts the features into a sample in place of pixels. If the
        source returns None, `encode` decodes the images.
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
    boxes: str | None
    """The form of boxes, a `BoxForm`; None: the family's own."""
    continues_text: bool
    """Whether the model is a base model, which continues a text instead of answering questions."""
    own_box_form: str | None
    """The name in `data.other_markup` of the boxes that the model writes as plain text, if any."""
    find_prompt: str
    """The question for the box of an object, with `{image}` and `{question}`, the object."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain data that determines token ids and labels.

        Two processors with equal settings encode every conversation to the same ids and labels.
        """
        ...

    @property
    def image_settings(self) -> Mapping[str, Any]:
        """Plain data that determines the results of `image_vision`."""
        ...

    def encode(self, conversation: Conversation, *, prompt: bool = False) -> Sample:
        """Returns the token ids, labels and images of a conversation.

        `Sample.images` are those that the sample has, by whose keys a decoder keeps features.

        Args:
            prompt: whether to leave out the answer and begin a turn of the assistant in its place.

        Raises:
            Dropped: the sample is too long, and the processor is configured to drop such rows.
            DataError: an image cannot be read, a box refers to an image that does not exist, or the
                sample is too long.
        """
        ...

    def length(self, conversation: Conversation, *, prompt: bool = False) -> Length:
        """Returns the size of the sample that `encode` returns.

        Does not decode any image, but may read their sizes.

        Raises:
            BadImage: the size of an image is needed and cannot be read.
            DataError: for the same reasons as `encode`, except images that cannot be decoded.
        """
        ...

    def image_vision(self, image: ImageSource) -> dict[str, torch.Tensor]:
        """Returns `Sample.vision` of a sample that has this image only.

        Raises:
            BadImage: the image cannot be decoded.
        """
        ...

    def collate_vision(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns `Batch.vision`, made from `Sample.vision` of one or more samples.

        Runs in data workers. It also computes what the network would otherwise have to ask the
        device for, such as the bounds of images: a training step never synchronizes. Numbers stay
        on the host. If every sample has vision tensors of equally named parts that only have to be
        joined, use `models.vision_tensors.concatenate_vision`.
        """
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Returns token ids as text for people, in which special tokens are shown by name."""
        ...

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of an answer in pieces, while its `ids` arrive.

        No piece ends within a character. Joined and stripped, they are the text of `decode`. `ids`
        hold no stop id.
        """
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


class Decoder(Protocol):
    """Decodes with a KV cache of its own. It keeps state between the steps of one answer."""

    device: torch.device
    answer: int
    """The number of the answer that was started last."""

    def start(
        self,
        inputs: Mapping[str, Any],
        *,
        new_tokens: int,
        image_keys: Sequence[str] | None = None,
        compiled: Literal["auto"] | bool = "auto",
        show_heads: ShowHeads | None = None,
    ) -> torch.Tensor:
        """Reads n left-padded prompts and returns the logits (n, V) of the first new tokens.

        Args:
            inputs: the result of `Family.inputs` for prompts.
            new_tokens: the maximum number of new tokens per row.
            image_keys: a key for each image, equal for equal images, by which features may be kept.
            compiled: the value of `Generation.compile`.
            show_heads: called for each block of each pass over prompts, before its attention.
        """
        ...

    def step(self, ids: torch.Tensor, answer: int | None = None) -> torch.Tensor:
        """Appends the tokens `ids` (n,) to the rows and returns the next logits (n, V).

        Raises:
            ValueError: `answer` is not the number of the answer that was started last.
        """
        ...

    def append(self, ids: torch.Tensor, *, show_heads: ShowHeads | None = None) -> torch.Tensor:
        """Appends tokens `ids` (n, t) in one pass and returns the logits (n, t, V) after each.

        The result is that of t calls of `step`. `show_heads` is as for `start`.
        """
        ...

    def running_rows(self, *, rows: int, slots: int, compiled: bool = False) -> RunningRows:
        """Returns rows for continuous batching, with a cache of their own.

        Args:
            rows: the most rows at a time.
            slots: the most tokens of a row, its prompt and its answer together.
        """
        ...


class Prompts(Protocol):
    """Prompts that are read in pieces, apart from the rows that they are to join."""

    inputs: Mapping[str, Any]
    length: int
    """Tokens of each prompt with its left padding."""
    lengths: Sequence[int]
    logits: torch.Tensor | None
    """(b, V), of the first new tokens; None until everything is read."""

    def advance(self, tokens: int) -> bool:
        """Reads about `tokens` tokens more, images included. Returns whether everything is read.

        Neither this method nor those of `RunningRows` synchronize.
        """
        ...


class RunningRows(Protocol):
    """Rows of a KV cache that join, are decoded together, and leave; each as if it were alone."""

    latest: torch.Tensor
    """(rows,), the latest token of each row. The caller writes it, in place, before a step."""

    def read(
        self,
        inputs: Mapping[str, Any],
        *,
        lengths: Sequence[int],
        image_keys: Sequence[str] | None = None,
    ) -> Prompts:
        """Returns prompts that are to be read, as for `Decoder.start`. Nothing is read yet.

        Args:
            lengths: the tokens of each prompt.
        """
        ...

    def join(self, prompts: Prompts, rows: Mapping[int, int], ids: torch.Tensor) -> None:
        """Adds prompts that are read.

        Args:
            rows: for the indices of the prompts that join, a free row each.
            ids: (len(rows),), the first new token of each of these.
        """
        ...

    def leave(self, row: int) -> None:
        """Frees a row."""
        ...

    def step(self) -> torch.Tensor:
        """Appends the `latest` tokens and returns the next logits (n, V).

        They are those of the first n rows, among which are all that have joined. They are valid
        until the next step.
        """
        ...

    def warm_up(self) -> None:
        """Compiles and captures all shapes of steps. Call it before any row joins."""
        ...


class Network(Protocol):
    """What a network must offer in addition to being transformers' `PreTrainedModel`.

    Its blocks are subclasses of transformers' `GradientCheckpointingLayer`. Training compiles the
    method `compute` of a block, which `forward` calls, or else `forward` itself. The class of a
    block may say in `dynamic_dims` which dimensions of its first argument have a size that changes
    between batches; by default, all but the last.

    `forward` takes the result of `Family.inputs`. Its further arguments are:

    - `labels` (B, T), not shifted, with which it returns a loss;
    - `target_positions` (S,), flat indices into B * T of the tokens whose successors are
      supervised: the logits are then (S, V), of these tokens only, and the loss is the same;
    - `num_items_in_batch`: the divisor of the summed losses; by default, the loss is their mean;
    - `logits_to_keep`: the number of logits to compute, counted from the end.
    """

    def decoder(self) -> Decoder | None:
        """Returns a new decoder of this network, or None if transformers' `generate` decodes.

        Not called for sharded networks and networks on several devices, which `generate` decodes.
        """
        ...


class Family(Protocol):
    """A model architecture: builds its network and its processor, and connects the two.

    For the network, see `Network`.
    """

    components: Mapping[str, str]
    """Module paths of "vision", "resampler", "language", "embeddings" and "head".

    A model that reads no images has no "vision" and no "resampler"."""
    lora_targets: Mapping[str, str]
    """Groups of linear layers for adapters, each a regular expression that matches module paths.

    There are "attention" and "language": the layers of the language model's attention, and all of
    its layers. "all-linear" is not among them, because it is the same for all families."""
    dtype: torch.dtype
    """The dtype of the base weights."""

    quantization: Mapping[str, Any] | None
    """Quantization of the base weights, unless the adapter requires its own quantization."""
    supports_packing: bool
    """Whether a row may contain several samples whose positions each start at 0."""
    supports_vision_cache: bool
    """Whether batches may have the `image_features` of images in place of the images."""
    fixed_image_size: bool
    """Whether the vision tower takes one tensor (N, ...) of equal images and nothing else.

    `training.speed` may then record its `forward` as CUDA graphs."""
    fsdp_units: Collection[str]
    """Class names of modules, such as blocks, whose weights FSDP gathers as a unit."""
    machine_settings: Sequence[str]
    """Constructor arguments that depend on the machine and are not properties of a model."""
    base_settings: Sequence[str]
    """Constructor arguments that choose the base weights. An exported model does not need them."""

    @property
    def max_tokens(self) -> int:
        """The most tokens of a prompt together with its answer."""
        ...

    def processor(self, features: FeatureSource | None = None) -> Processor:
        """Returns a processor.

        Args:
            features: a source of vision features, which replace the images in samples.
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

    def image_features(
        self, model: PreTrainedModel, vision: Mapping[str, Any]
    ) -> list[torch.Tensor]:
        """Returns the features (Q, D) of each image of `vision`, from `Processor.collate_vision`.

        The features are everything that the language model gets of an image. A batch that has
        features needs no images. `model` may be wrapped by adapters.

        Args:
            vision: with tensors on the device of the vision tower.
        """
        ...

    def image_grids(self, vision: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Returns the rows and columns of the cells of each image.

        Cells are patches in reading order, or tokens if `query_attention` is None.
        """
        ...

    def query_attention(
        self, model: PreTrainedModel, vision: Mapping[str, Any]
    ) -> list[torch.Tensor] | None:
        """Returns how the tokens of each image attend to its cells, (Q, cells), float32.

        They are means over heads with a sum of 1. None: each cell has a token of its own.
        """
        ...

    def flops(self, batch: Batch, trained: Mapping[str, float]) -> float:
        """Returns the FLOPs of a training step on `batch`, not counting padding.

        Args:
            trained: the fraction of the parameters that is trained, by component.
        """
        ...

    def answering_memory(
        self, *, rows: int, tokens: int, image_tokens: int, new_tokens: int, at_once: bool
    ) -> int:
        """Returns the bytes that answering a batch takes in addition to the weights, roughly.

        Args:
            rows: number of rows, times the number of beams.
            tokens, image_tokens, new_tokens: upper bounds per row: tokens of the prompt, how many
                of them are of images, and tokens of the answer.
            at_once: whether all prompts are read in one pass.
        """
        ...

    def loss_memory(self, *, rows: int, tokens: int, image_tokens: int, supervised: int) -> int:
        """Returns the bytes that the loss of a batch takes without gradients, roughly.

        Args:
            tokens, image_tokens, supervised: upper bounds per row.
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
