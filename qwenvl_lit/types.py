"""The values that stages pass to each other: images, boxes, conversations, samples, batches.

These types know nothing about the markup of a model. They check only what they can check alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from PIL import Image

from qwenvl_lit import images
from qwenvl_lit.terminal import printable

if TYPE_CHECKING:
    import torch

Frame = Literal["pixel", "grid", "unit"]  # pixels of the image | integers 0..999 | 0..1
Role = Literal["system", "user", "assistant"]

_RAISED_IN_WORKER = re.compile(r"(?m)^qwenvl_lit\.types\.\w+: ")


class DataError(ValueError):
    """Input that cannot be used.

    The message names the file, line and row id, what was expected, what was found and what to do.
    Each argument is a line of it, in which control characters are escaped: names and ids that it
    quotes may hold some.
    """

    where: str = ""  # the place of the row, as in `Conversation.where`; "" if it is not known
    row_id: str = ""  # "" if the row could not be read that far

    def in_row(self, where: str, row_id: str = "") -> Self:
        """Returns the error of a row, whose message begins with the place and the id of the row."""
        text, location = str(self), location_of(where, row_id)
        if text.startswith(location) or (where and text.startswith(where)):
            location = ""
        located = type(self)(location + text)
        located.where, located.row_id = where, row_id
        return located

    def __str__(self) -> str:
        lines = []
        for argument in self.args:
            # An error from a data worker starts with that worker's traceback.
            message = _RAISED_IN_WORKER.split(str(argument))[-1].rstrip()
            lines.append(printable(message))
        return "\n".join(lines)


def location_of(where: str, row_id: str) -> str:
    """Returns the beginning of messages about a row.

    >>> location_of("a.jsonl:3", "x")
    "a.jsonl:3: row 'x': "
    """
    location = f"{where}: " if where else ""
    return f"{location}row {row_id!r}: " if row_id else location


class BadImage(DataError):  # noqa: N818 - a kind of DataError
    """An image that is missing, cannot be downloaded or cannot be decoded."""


class Dropped(DataError):  # noqa: N818 - a decision, not an error
    """A row that the config says to leave out; the message names file, line, row id and reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Axis-aligned box in the frame it was measured in; the origin is the top-left corner.

    A model may answer with an inverted box: readers check the order of the corners, the type does
    not.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    frame: Frame = "pixel"

    def __post_init__(self):
        if not all(map(math.isfinite, (self.x0, self.y0, self.x1, self.y1))):
            raise DataError(f"box needs finite numbers, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quad:
    """Four corners (x, y) in reading order, for example of rotated text."""

    points: tuple[tuple[float, float], ...]
    frame: Frame = "pixel"

    def __post_init__(self):
        finite = all(math.isfinite(value) for point in self.points for value in point)
        if len(self.points) != 4 or not finite:
            raise DataError(f"quad needs four points of finite numbers, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point, for example where to click."""

    x: float
    y: float
    frame: Frame = "pixel"

    def __post_init__(self):
        if not (math.isfinite(self.x) and math.isfinite(self.y)):
            raise DataError(f"point needs finite numbers, got {self}")


Region = Box | Quad | Point


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundedObject:
    """A phrase and where its objects are in an image.

    A question may hold only one of the two: then `label` is None or `boxes` is empty.
    """

    label: str | None = None
    boxes: tuple[Region, ...] = ()
    image: int = 0  # index into the images of the conversation


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image given as file, encoded bytes, PIL image or address, or inside a file of rows.

    It is downloaded and decoded when it is first opened, in the data worker that needs it.

    Raises:
        DataError: `source` is an address as text, which has no folder to be downloaded to.
    """

    # Text is the path of a file.
    source: str | Path | bytes | Image.Image | images.RemoteImage | images.StoredImage
    options: images.ImageOptions = images.AS_STORED
    # Size and key are cached, since both read the file.
    _size: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)
    _key: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.source, str):
            return
        if "://" in self.source[:20]:
            raise DataError(
                f"{self.source[:200]!r} is an address, and ImageSource takes the path of a file; "
                "use qwenvl_lit.data.download.files.RemoteImage(address, folder)"
            )
        object.__setattr__(self, "source", Path(self.source).expanduser())

    def open(self) -> Image.Image:
        """Returns the decoded image in its own mode, or as `options` say.

        Raises:
            BadImage: the file is missing, broken, no image of `images.FORMATS`, or too large.
        """
        file = self._file()
        with self._reading_errors():
            return images.read_image(file, self.options)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, read from the header alone.

        Raises:
            BadImage: as `open`.
        """
        if self._size is not None:
            return self._size
        file = self._file()
        with self._reading_errors():
            size = images.read_size(file, self.options)
        # A frozen dataclass can fill a cache in no other way. `_size` follows from `source`,
        # so the value itself does not change.
        object.__setattr__(self, "_size", size)
        return size

    @property
    def header(self) -> images.Header:
        """What the file says about the image, whatever the `options`.

        Raises:
            BadImage: as `open`.
        """
        file = self._file()
        with self._reading_errors():
            return images.read_header(file)

    @property
    def key(self) -> str:
        """SHA-256 of the content: equal images have equal keys, wherever they are stored.

        Raises:
            BadImage: the file cannot be read.
        """
        if self._key is not None:
            return self._key
        content = hashlib.sha256(self._content())
        if self.options != images.AS_STORED:
            content.update(repr(self.options).encode())
        if not isinstance(self.source, Image.Image):  # which may change
            object.__setattr__(self, "_key", content.hexdigest())  # as `_size`
        return content.hexdigest()

    @property
    def name(self) -> str:
        """Path or address of the image, else its kind; for messages and written predictions."""
        if isinstance(self.source, Path):
            return str(self.source)
        if isinstance(self.source, bytes | Image.Image):
            return f"<{type(self.source).__name__}>"
        assert not isinstance(self.source, str)  # `__post_init__` has made it a path
        return self.source.name

    @contextmanager
    def _reading_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise BadImage(
                f"image {self.name} does not exist; check the path and `data.root`"
            ) from None
        except images.UnreadableImageError as error:
            raise BadImage(f"image {self.name} cannot be read as an image: {error}") from error
        except OSError as error:
            raise BadImage(
                f"image {self.name} cannot be read: {error.strerror}; "
                "check the path and `data.root`"
            ) from None

    def _content(self) -> bytes:
        file = self._file()
        if isinstance(file, bytes):
            return file
        if isinstance(file, Image.Image):
            image = self.open()
            # Equal indices under different palettes are different images.
            header = repr((image.mode, image.size, image.getpalette()))
            return header.encode() + image.tobytes()
        with self._reading_errors():
            return images.read_file(file)

    def _file(self) -> Path | bytes | Image.Image:
        if isinstance(self.source, Path | bytes | Image.Image):
            return self.source
        assert not isinstance(self.source, str)  # `__post_init__` has made it a path
        try:
            if isinstance(self.source, images.StoredImage):
                return self.source.content()
            return self.source.path()
        except DataError as error:
            raise BadImage(str(error)) from error


Part = str | ImageSource | GroundedObject


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """The text, images and objects that one speaker contributes."""

    role: Role
    parts: tuple[Part, ...]


QUESTION_ID = "question"  # of a conversation that is asked directly, and is not a row


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One row of a dataset, or one question of a user."""

    id: str
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    """Further correct answers as plain text: captions, or the ten answers of VQA."""
    options: tuple[str, ...] = ()
    """Answers to choose from. The likeliest one is the prediction; nothing is generated."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further columns of the row, by which scores are selected and grouped."""
    index: int = 0
    """Position in the dataset. Predictions are written in this order."""
    where: str = field(default="", compare=False)
    """The place that the row was read from, for messages.

    `FILE`, `FILE:LINE`, in an array `FILE:LINE (row N)`, or in a parquet file
    `FILE (row N, row group M)`.
    """
    notes: tuple[str, ...] = ()
    """What a reader repaired in this row, or kept although it looks wrong."""

    @property
    def location(self) -> str:
        """What messages about a row begin with: file, line and id. A question has no location."""
        if not self.where and self.id == QUESTION_ID:
            return ""
        return location_of(self.where, self.id)

    def located(self, error: DataError) -> DataError:
        """Returns an error about this row with the row's location."""
        return error.in_row(self.where, self.id) if self.location else error

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images in reading order; `GroundedObject.image` is an index into this tuple."""
        parts = (part for turn in self.turns for part in turn.parts)
        return tuple(part for part in parts if isinstance(part, ImageSource))

    @property
    def answer(self) -> Turn | None:
        """The last turn if it is the assistant's, which predictions are compared with."""
        if self.turns and self.turns[-1].role == "assistant":
            return self.turns[-1]
        return None

    def prompt(self) -> Conversation:
        """Returns the conversation without its answer."""
        return replace(self, turns=self.turns[:-1]) if self.answer else self


class Length(NamedTuple):
    """The size of a sample."""

    tokens: int
    supervised: int  # tokens
    image_tokens: int  # tokens that vision features replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An encoded conversation of T tokens."""

    conversation: Conversation
    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, not shifted; -100 where a token is not supervised
    vision_positions: torch.Tensor
    """(M,) int64: the tokens that vision features replace, in the order of the images."""
    vision: Mapping[str, torch.Tensor]
    """Tensors that the model family defines; `Processor.collate_vision` makes those of a batch."""
    position_ids: torch.Tensor | None = None
    """(A, T) int64: positions on A axes, of a family that computes them. None: they are counted."""
    images: tuple[ImageSource, ...] = ()
    """The images of the sample. A long conversation may have lost the first ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B padded rows of T tokens, or one packed row of T tokens (B = 1).

    Positions are flat indices into (B * T). They are computed on the host, so that a step neither
    searches for them nor synchronizes to count them.

    A packed row consists of segments that do not attend to each other: one for each sample, then
    those of the padding.
    """

    conversations: tuple[Conversation, ...]
    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, not shifted
    attention_mask: torch.Tensor | None
    """(B, T) int64; None for a packed row."""
    position_ids: torch.Tensor | None
    """(B, T) int64, restarting with each packed sample, 0 at padding; None for padded rows."""
    lengths: tuple[int, ...]  # tokens of each sample without padding
    vision_positions: torch.Tensor  # (M,) int64
    target_positions: torch.Tensor  # (S,) int64: tokens whose successor is supervised
    vision: Mapping[str, Any]
    """Tensors, and numbers that stay on the host; see `Processor.collate_vision`."""
    axis_positions: torch.Tensor | None = None
    """(A, B, T) int64: the `position_ids` of the samples, 0 at padding; None if they have none."""
    images: tuple[ImageSource, ...] = ()
    """The images of all samples, in the order of their tokens."""
    dropped: tuple[Dropped, ...] = ()
    """For each row of this batch that was left out, the reason."""
    segment_bounds: torch.Tensor | None = None
    """(n + 1,) int32: cumulative lengths of the n segments of a packed row, of which the last are
    empty; None for padded rows."""
    longest_segment: int | None = None
    """Upper bound on the tokens of a segment of a packed row; None for padded rows. Bound and n
    are the same for all batches of a run."""

    def to(self, device, non_blocking: bool = True) -> Batch:
        """Returns a copy on `device`; Lightning calls this method."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Returns a copy in page-locked memory; the DataLoader calls this method."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            return change(value) if hasattr(value, "device") else value

        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                values[item.name] = {name: changed(entry) for name, entry in value.items()}
            else:
                values[item.name] = changed(value)
        return Batch(**values)


def micro_batches_of(batch: Batch | Sequence[Batch]) -> Sequence[Batch]:
    """Returns the batches that a loader yields together: one, or several.

    They are the micro-batches of an optimizer step, or rows that are evaluated one after another.
    """
    return [batch] if isinstance(batch, Batch) else batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The answer of a model to a conversation."""

    conversation: Conversation  # with its reference answer, if it has one
    text: str  # the answer in the markup of the family, without end-of-turn tokens
    parts: tuple[Part, ...]  # `text`, parsed to str and GroundedObject in pixels
    reference: str | None = None  # the reference answer in the same markup
    tokens: int | None = None  # number of generated tokens, without the end-of-turn token
    thoughts: str | None = None  # what a thinking model wrote before the answer, without its tags
