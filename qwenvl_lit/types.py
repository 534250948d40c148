"""Values that cross stages. They know no model's markup and check only what they can know alone."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

Frame = Literal["pixel", "grid", "unit"]  # pixels of the image | integers 0..999 | 0..1
Role = Literal["system", "user", "assistant"]

MAX_IMAGE_PIXELS = (
    100_000_000  # 300 MB as RGB: what claims to be larger is broken, or made to fill the memory
)


class DataError(ValueError):
    """Input that cannot be used; the message names file, line, id, what was expected and what to do."""


class BadImage(DataError):  # noqa: N818 - a kind of DataError
    """An image that is missing, cannot be fetched or cannot be read as one."""


class Dropped(DataError):  # noqa: N818 - a decision, not an error
    """A row that the config says to leave out; the message names file, line, id and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Axis-aligned box in the frame it was measured in; origin top-left.

    A model's answer may be inverted: readers check the order, the type does not.
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
    """Four corners (x, y) in reading order, for rotated text and the like."""

    points: tuple[tuple[float, float], ...]
    frame: Frame = "pixel"

    def __post_init__(self):
        if len(self.points) != 4 or not all(
            math.isfinite(v) for point in self.points for v in point
        ):
            raise DataError(f"quad needs four points of finite numbers, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundedObject:
    """A phrase and where it is. A question may hold only one of the two: `label` None, or no `boxes`."""

    label: str | None = None
    boxes: tuple[Box | Quad, ...] = ()
    image: int = 0  # index among the images of the conversation


class Stored(Protocol):
    """An image that has to be brought before it can be opened."""

    @property
    def name(self) -> str:
        """Its address, for messages and written predictions."""

    def path(self) -> Path:
        """The file on disk, fetched if it is not there yet; raises DataError if that fails."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image by file, encoded bytes, PIL image or address. It is fetched and decoded late, in the worker that needs it."""

    source: Path | bytes | Image.Image | Stored
    _size: tuple[int, int] | None = field(
        default=None, init=False, repr=False, compare=False
    )  # read once, a header costs a file access

    def open(self) -> Image.Image:
        """The decoded image as stored (mode kept, no EXIF rotation: the original model does none).

        Raises:
            BadImage: the file is missing, broken, no image, or has more than `MAX_IMAGE_PIXELS`.
        """
        with self._opened() as image:
            image.load()
            return image

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, from the header alone.

        Raises:
            BadImage: as `open`.
        """
        if self._size is not None:
            return self._size
        with self._opened() as image:
            object.__setattr__(self, "_size", image.size)
            return image.size

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        if isinstance(self.source, Image.Image):
            yield self.source
            return
        file = self._file()
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError(
                        f"{image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}; scale it down"
                    )
                yield image
        except FileNotFoundError:
            raise BadImage(
                f"image {self.name} does not exist; check the path and `data.root`"
            ) from None
        except UnidentifiedImageError:
            raise BadImage(
                f"image {self.name} cannot be read as an image: its format is unknown"
            ) from None
        except (*_BROKEN, Image.DecompressionBombError) as error:
            raise BadImage(f"image {self.name} cannot be read as an image: {error}") from error

    def _file(self) -> Path | bytes:
        assert not isinstance(self.source, Image.Image)
        if isinstance(self.source, Path | bytes):
            return self.source
        try:
            return self.source.path()
        except DataError as fault:
            raise BadImage(str(fault)) from fault

    @property
    def key(self) -> str:
        """SHA-256 of the content: equal images have equal keys, wherever they are stored.

        Raises:
            BadImage: its file cannot be read.
        """
        if isinstance(self.source, Image.Image):
            content = (
                repr((self.source.mode, self.source.size, self.source.getpalette())).encode()
                + self.source.tobytes()
            )
        else:
            file = self._file()
            try:
                content = file if isinstance(file, bytes) else file.read_bytes()
            except OSError as fault:
                raise BadImage(
                    f"image {self.name} cannot be read: {fault.strerror}; check the path and `data.root`"
                ) from None
        return hashlib.sha256(content).hexdigest()

    @property
    def name(self) -> str:
        """For messages and written predictions: the path or address, or what kind of image it is."""
        if isinstance(self.source, Path):
            return str(self.source)
        return (
            f"<{type(self.source).__name__}>"
            if isinstance(self.source, bytes | Image.Image)
            else self.source.name
        )


_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
)  # what Pillow's readers raise for bad files

Part = str | ImageSource | GroundedObject


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one speaker says."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One row of a dataset, or one user's question."""

    id: str
    turns: tuple[Turn, ...]
    references: tuple[
        str, ...
    ] = ()  # further right answers as plain text (captions, VQA's ten answers)
    options: tuple[
        str, ...
    ] = ()  # answers to choose from: the likeliest is the prediction, nothing is generated
    columns: Mapping[str, str] = field(
        default_factory=dict
    )  # further columns of the row, for selecting and grouping scores
    index: int = 0  # place in its dataset; predictions are written in this order
    where: str = field(
        default="", compare=False
    )  # the file and line it was read from, for messages
    notes: tuple[
        str, ...
    ] = ()  # what a reader repaired in this row or kept against better knowledge

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images in reading order; `GroundedObject.image` counts in this tuple."""
        return tuple(
            part for turn in self.turns for part in turn.parts if isinstance(part, ImageSource)
        )

    @property
    def answer(self) -> Turn | None:
        """The last turn, if it is the assistant's: what a prediction is compared with."""
        return self.turns[-1] if self.turns and self.turns[-1].role == "assistant" else None

    def prompt(self) -> Conversation:
        """The conversation up to the answer."""
        return replace(self, turns=self.turns[:-1]) if self.answer else self


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An encoded conversation of T tokens."""

    conversation: Conversation
    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, -100 where nothing is learned; not shifted
    vision_positions: (
        torch.Tensor
    )  # (M,) int64: tokens that vision features overwrite, in image order
    vision: Mapping[str, torch.Tensor]  # the family's own tensors; concatenate along dimension 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B padded rows of T tokens, or one packed row. Positions are flat indices into (B * T), so that no step has to search for them, and
    what is counted is known without the device.

    A packed row is cut into segments that do not see each other: one for each sample, and those of padding.
    """

    conversations: tuple[Conversation, ...]
    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, not shifted
    attention_mask: torch.Tensor | None  # (B, T) int64; None when packed
    position_ids: (
        torch.Tensor | None
    )  # (B, T) int64, restarting with each packed sample, 0 at padding; None when padded
    lengths: tuple[int, ...]  # tokens of each sample, padding left out
    vision_positions: torch.Tensor  # (M,) int64
    target_positions: torch.Tensor  # (S,) int64: tokens whose successor is supervised
    vision: Mapping[str, torch.Tensor]
    dropped: tuple[str, ...] = ()  # why rows that belong to this batch are not in it
    segment_bounds: torch.Tensor | None = (
        None  # (n + 1,) int32, cumulative lengths of segments, the last of them empty; when packed
    )
    longest_segment: int | None = (
        None  # no segment has more tokens; as T and n the same for all batches of a run; when packed
    )

    def _map(self, change) -> Batch:
        def visit(value):
            if isinstance(value, Mapping):
                return {name: change(tensor) for name, tensor in value.items()}
            return change(value) if hasattr(value, "device") else value

        return Batch(**{f.name: visit(getattr(self, f.name)) for f in fields(self)})

    def to(self, device, non_blocking: bool = True) -> Batch:
        """A copy on `device`; Lightning calls this."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A model's answer to a conversation."""

    conversation: Conversation  # with its expected answer, if it has one
    text: str  # the answer in the family's markup, without end marks
    parts: tuple[Part, ...]  # `text` parsed back: str, and GroundedObject in pixels
    reference: str | None = None  # the expected answer in the same markup
    tokens: int | None = None  # that were decoded, without the end mark
