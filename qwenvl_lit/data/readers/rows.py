"""Turns the draft of a row into a conversation: reads its tags and markup, and checks them."""

from __future__ import annotations

import base64
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import get_args

from qwenvl_lit.data.readers.boxes import FRAME_LIMITS, BoxReader, OnBadBox
from qwenvl_lit.data.readers.layouts import Draft, DraftPart, ImageReference, Placeholder
from qwenvl_lit.data.readers.paths import mapped, windows_hint
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.images import DeepImage, Exif, ImageOptions
from qwenvl_lit.types import (
    BadImage,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Part,
    Role,
    Turn,
)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading the rows of one dataset, in any layout.

    Args:
        root: folder of relative paths of files and images; None: the folder of the file that names
            them.
        path_map: replaces the beginnings of paths and addresses, {prefix elsewhere: prefix here}.
        on_bad_box: see `BoxReader`.
        prompt: for captions and questions whose layout has none; None: the reader's own.
        cache: folder of remote images and of indexes of files; None: remote images are refused, and
            indexes are kept in memory only.
        download: fetch remote images; false: use only those in `cache`.
        allow_private_hosts: also fetch images from this machine and its network.
        user_agent: what downloads call themselves; None: the name of the package.
        exif, on_deep_image: see `ImageOptions`.
    """

    root: Path | None = None
    path_map: Mapping[str, str] = field(default_factory=dict)
    on_bad_box: OnBadBox = "error"
    prompt: str | None = None
    cache: Path | None = None
    download: bool = True
    allow_private_hosts: bool = False
    user_agent: str | None = None
    exif: Exif = "ignore"
    on_deep_image: DeepImage = "keep"
    seed: int = 0

    def __post_init__(self):
        choices = get_args(OnBadBox)
        if self.on_bad_box not in choices:
            raise DataError(
                f"on_bad_box must be one of {', '.join(choices)}, got {self.on_bad_box!r}"
            )
        if not (self.user_agent or "x").isascii() or not (self.user_agent or "x").isprintable():
            raise DataError(
                f"data.user_agent must be printable ASCII characters, got {self.user_agent!r}"
            )
        _ = self.image_options  # checks its values

    @cached_property
    def image_options(self) -> ImageOptions:
        return ImageOptions(exif=self.exif, deep=self.on_deep_image)


DEFAULT = ReadOptions()

_TAG = re.compile(r"<img>|<image>|<ref-object>|<bbox>")
_IMG_END = "</img>"
_MARKUP = re.compile(r"</?(?:img|ref|box|quad)>")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,")
# The first bytes of PNG, JPEG, GIF, WebP and BMP files.
_BARE_BASE64 = re.compile(
    r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3])[A-Za-z0-9+/\s]{50,}(?:=\s*){0,2}"
)


def conversation_from(
    draft: Draft,
    *,
    row_id: str,
    root: Path,
    index: int,
    columns: Mapping[str, str],
    where: str = "",
    read_options: ReadOptions = DEFAULT,
) -> Conversation:
    """Returns the conversation of a row.

    - `<img>path</img>` in the text is an image. The text around it is kept as it is.
    - `<image>` is the next of `images`. As in ms-swift it becomes `Picture k: `, the image and a
      line break. If there is no such tag, all `images` are put before the first question.
    - The k-th `<ref-object>` is the caption of the k-th object, and the k-th `<bbox>` its boxes.
      Both are counted over all turns.
    - `<ref>`, `<box>` and `<quad>` in the text are objects on the grid, in the last image before
      them.

    Raises:
        DataError: turns do not alternate, an image is missing, the number of tags is not the number
            of images or objects, or markup cannot be read; or a box has its corners in the wrong
            order, is outside its image or has fractions on the grid. `read_options.on_bad_box` can
            keep or repair such boxes, or have `Dropped` raised.
    """
    _check_roles([role for role, _ in draft.turns])
    turns = [(role, _split_at_tags(parts)) for role, parts in draft.turns]
    _place_listed_images(turns, len(draft.images))
    all_parts = [part for _, parts in turns for part in parts]
    boxes = BoxReader(read_options.on_bad_box)
    objects = [boxes.read_object(f"object {k}", raw) for k, raw in enumerate(draft.objects, 1)]
    _check_placeholders(all_parts, len(objects), boxes)
    _check_characters(
        [row_id, *draft.images, *draft.references, *columns.values()],
        _texts_in(all_parts),
        [obj.label or "" for obj in objects],
    )
    images = [
        image_from(address, root, read_options) for address in _addresses(all_parts, draft.images)
    ]
    for k, obj in enumerate(objects):
        what = f"object {k + 1} ({reprlib.repr(obj.label)})"
        objects[k] = boxes.check_object(what, obj, images)
    reader = _TurnReader(images, objects, boxes)
    return Conversation(
        id=row_id,
        turns=tuple(Turn(role=role, parts=reader.read(parts)) for role, parts in turns),
        references=draft.references,
        options=draft.options,
        columns=columns,
        index=index,
        where=where,
        notes=tuple(boxes.notes),
    )


def _check_roles(roles: Sequence[str]) -> None:
    after_system = roles[1:] if roles[:1] == ["system"] else roles
    if not after_system:
        raise DataError("there is no turn; expected at least a question")
    for number, role in enumerate(after_system):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(
                f"turns must go user, assistant, user, ..., with at most one system turn before "
                f"them; got {', '.join(roles)}"
            )


def _split_at_tags(parts: Sequence[DraftPart]) -> list[DraftPart]:
    """Replaces the tags in the text of a turn by what they stand for."""
    pieces: list[DraftPart] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            pieces += group
            continue
        text = "".join(group)
        for piece, tag in split_at_tags(text):
            pieces.append(piece)
            if isinstance(tag, str):
                pieces.append(ImageReference(tag))
            elif tag is not None:
                pieces.append(tag)
    return pieces


def split_at_tags(text: str) -> Iterator[tuple[str, str | Placeholder | None]]:
    """Yields text and the tag after it: address of an `<img>`, `Placeholder`, or None at the end.

    An `<img>` that is not closed stays text. The time is linear in the length of the text: a
    pattern for `<img>...</img>` would search the whole rest of it at each tag that is not closed.

    >>> list(split_at_tags("see <img>a.png</img>!"))
    [('see ', 'a.png'), ('!', None)]
    """
    position = end = 0
    last_close = text.rfind(_IMG_END)
    while tag := _TAG.search(text, position):
        position = tag.end()
        if tag[0] != "<img>":
            yield text[end : tag.start()], Placeholder(tag[0])
        elif position <= last_close:
            close = text.index(_IMG_END, position)
            yield text[end : tag.start()], text[position:close]
            position = close + len(_IMG_END)
        else:
            continue
        end = position
    yield text[end:], None


def _place_listed_images(turns: Sequence[tuple[Role, list[DraftPart]]], images: int) -> None:
    """Puts placeholders for `images` before the first question, unless the text has them."""
    tags = sum(parts.count(Placeholder.IMAGE) for _, parts in turns)
    if tags == images:
        return
    if tags:
        raise DataError(
            f"{tags} <image> tags for {images} `images`; write one tag for each image, or none to "
            f"put all images before the first question"
        )
    question = next(parts for role, parts in turns if role == "user")
    question[:0] = [Placeholder.IMAGE] * images


def _check_placeholders(parts: Sequence[DraftPart], objects: int, boxes: BoxReader) -> None:
    labels, places = parts.count(Placeholder.LABEL), parts.count(Placeholder.BOXES)
    used = max(labels, places)
    if used < objects and boxes.on_bad_box == "keep":
        boxes.notes.append(f"{objects - used} of {objects} `objects` are not used")
    elif used != objects:
        raise boxes.error(
            f"{labels} <ref-object> and {places} <bbox> for {objects} `objects`; the k-th "
            f"placeholder of a kind stands for the k-th object, and each object needs one"
        )


def _texts_in(parts: Sequence[DraftPart]) -> Iterator[str]:
    for part in parts:
        match part:
            case str(text) | ImageReference(address=text):
                yield text


def _check_characters(*texts: Iterable[str]) -> None:
    try:
        "\n".join(chain(*texts)).encode()
    except UnicodeEncodeError as error:
        around = ascii(error.object[max(0, error.start - 20) : error.end + 20])
        raise DataError(
            f"text contains half of a surrogate pair, {error.object[error.start]!a} in {around}; "
            f"write the whole character"
        ) from None


def _addresses(parts: Sequence[DraftPart], listed: Sequence[str]) -> Iterator[str]:
    """Yields the addresses of all images in reading order; `listed` are those of placeholders."""
    next_listed = iter(listed)
    for part in parts:
        if part is Placeholder.IMAGE:
            yield next(next_listed)
        elif isinstance(part, ImageReference):
            yield part.address


class _TurnReader:
    """Reads the turns of one conversation, in order."""

    def __init__(
        self, images: Sequence[ImageSource], objects: Sequence[GroundedObject], boxes: BoxReader
    ):
        self._images = images
        self._images_read = 0
        self._labelled = iter(objects)
        self._boxed = iter(objects)
        self._boxes = boxes

    def read(self, draft_parts: Sequence[DraftPart]) -> tuple[Part, ...]:
        parts: list[Part] = []
        for part in draft_parts:
            match part:
                case str():
                    self._append_text(parts, part)
                case ImageReference():
                    self._append_image(parts)
                case Placeholder.IMAGE:
                    _append(parts, f"Picture {self._images_read + 1}: ")
                    self._append_image(parts)
                    _append(parts, "\n")
                case Placeholder.LABEL:
                    obj = next(self._labelled)
                    if obj.label is None:
                        raise self._boxes.error(
                            "a <ref-object> stands for an object without `caption`"
                        )
                    _append(parts, GroundedObject(label=obj.label, image=obj.image))
                case Placeholder.BOXES:
                    obj = next(self._boxed)
                    _append(parts, GroundedObject(boxes=obj.boxes, image=obj.image))
        return tuple(parts)

    def _append_image(self, parts: list[Part]) -> None:
        parts.append(self._images[self._images_read])
        self._images_read += 1

    def _append_text(self, parts: list[Part], text: str) -> None:
        if "<" not in text:  # most text has no markup, and rows are read each time they are fetched
            _append(parts, text)
            return
        for part in objects_from_tags(text, image=max(0, self._images_read - 1), fractions=True):
            if isinstance(part, GroundedObject):
                _append(parts, self._checked(part))
                continue
            if stray := _MARKUP.search(part):
                raise self._boxes.error(
                    f"cannot read {part[stray.start() :][:60]!r}; expected <img>path</img>, "
                    f"<ref>label</ref>, <box>(x1,y1),(x2,y2)</box> or <quad> with four points, of "
                    f"whole numbers"
                )
            _append(parts, part)

    def _checked(self, obj: GroundedObject) -> GroundedObject:
        if obj.boxes and not self._images:
            if self._boxes.on_bad_box != "keep":
                raise self._boxes.error(
                    "there is a box but no image; write <img>path</img> into the question or give "
                    "`images`; or keep such boxes, data.on_bad_box=keep, or leave their rows out, "
                    "data.on_bad_box=drop"
                )
            self._boxes.notes.append("text: there is a box but no image; kept as it is")
        limits = FRAME_LIMITS["grid"]
        boxes = tuple(self._boxes.check_box("text", box, limits) for box in obj.boxes)
        return GroundedObject(label=obj.label, boxes=boxes, image=obj.image)


def image_from(address: str, root: Path, read_options: ReadOptions = DEFAULT) -> ImageSource:
    """Returns an image, given as a path, a web address or base64 text.

    A remote image is not fetched yet.

    Args:
        root: folder of relative paths.

    Raises:
        BadImage: there is no such file, or the base64 text is broken.
        DataError: the image is remote and there is no cache for it, or the address is of another
            kind.
    """
    address = mapped(address, read_options.path_map)
    if inline := _DATA_URI.match(address) or _BARE_BASE64.fullmatch(address):
        text = address[inline.end() :] if address.startswith("data:") else address
        return ImageSource(_decoded("".join(text.split())), read_options.image_options)
    scheme = _SCHEME.match(address)
    if scheme and scheme[1].lower() in ("http", "https"):
        if read_options.cache is None:
            raise DataError(
                f"image {address[:100]!r} is remote, and there is no folder to keep it in; "
                f"set data.cache, or give a file"
            )
        from qwenvl_lit.data.download.files import RemoteImage

        folder = read_options.cache / "images"
        remote = RemoteImage(
            address,
            folder,
            download=read_options.download,
            allow_private_hosts=read_options.allow_private_hosts,
            user_agent=read_options.user_agent,
        )
        return ImageSource(remote, read_options.image_options)
    if scheme and scheme[1].lower() == "file":
        address = address[scheme.end() :]
    elif scheme or address.startswith("data:"):
        raise DataError(
            f"image {address[:100]!r} is not a file, an http(s) address or base64 data; "
            f"download it and give its path"
        )
    file = os.path.join(root, address)
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise BadImage(
            f"image {file[:1000]} does not exist; check the path, `data.root` and `data.path_map`"
            f"{windows_hint(address)}"
        )
    version = (status.st_ino, status.st_size, status.st_mtime_ns)
    return _image_file(file, version, read_options.image_options)


@lru_cache(maxsize=1 << 16)
def _image_file(file: str, version: tuple[int, ...], options: ImageOptions) -> ImageSource:
    """Returns the same object for the same file, which remembers the size of the image.

    Opening the file to measure it takes longer than everything else that is done for a row.
    """
    return ImageSource(Path(file), options)


def _decoded(text: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadImage(f"image {text[:40]!r}... is not base64: {error}") from None
    if not content:
        raise BadImage("an image is given as base64, but empty")
    return content


def _append(parts: list[Part], part: Part) -> None:
    """Appends a part, or merges it into the last one.

    Text is joined with text before it. Boxes that directly follow an object in the same image
    become boxes of that object, since the markup of both reads the same.
    """
    last = parts[-1] if parts else None
    if isinstance(part, str):
        if isinstance(last, str):
            parts[-1] = last + part
        elif part:
            parts.append(part)
    elif _belongs_to(last, part):
        boxes = last.boxes + part.boxes
        parts[-1] = GroundedObject(label=last.label, boxes=boxes, image=part.image)
    else:
        parts.append(part)


def _belongs_to(last: Part | None, part: Part) -> bool:
    """Tells whether `part` has further boxes of the object `last`."""
    if not isinstance(part, GroundedObject) or not isinstance(last, GroundedObject):
        return False
    return part.label is None and (part.image == last.image or not last.boxes)
