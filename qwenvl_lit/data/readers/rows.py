"""Turns the draft of a row into a conversation: reads its tags and markup, and checks them."""

from __future__ import annotations

import base64
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import get_args

from qwenvl_lit.data.readers.boxes import BoxReader, OnBadBox
from qwenvl_lit.data.readers.drafts import Draft, ImageReference, Placeholder
from qwenvl_lit.data.readers.markup import (
    LITERAL_ANSWER,
    Markup,
    TurnReader,
    check_placeholders,
    images_in,
    place_listed_images,
    read_tags,
    texts_in,
)
from qwenvl_lit.data.readers.paths import mapped, windows_hint
from qwenvl_lit.data.readers.unread_images import named_files
from qwenvl_lit.images import DeepImage, Exif, ImageOptions
from qwenvl_lit.types import (
    BadImage,
    Conversation,
    DataError,
    ImageSource,
    Turn,
)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading the rows of one dataset, in any layout.

    Args:
        root: folder of relative paths of files and images; None: the folder of the file that names
            them.
        path_map: replaces the beginnings of paths and addresses, {prefix elsewhere: prefix here}.
        markup: where tags and markup are read: in "all" turns, in "questions" (all turns but
            answers), or in "none". Elsewhere they are text.
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
    markup: Markup = "all"
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
        for name, choices in (("on_bad_box", OnBadBox), ("markup", Markup)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise DataError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}"
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

    - `<img>path</img>` in the text is an image, and `<image>` is the next of `images`. The text
      around them is kept as it is. See `place_listed_images` for rows with fewer or more tags than
      images.
    - The k-th `<ref-object>` is the caption of the k-th object, and the k-th `<bbox>` its boxes.
      Both are counted over all turns.
    - `<ref>`, `<box>` and `<quad>` in the text are objects on the grid, in the last image before
      them.

    `read_options.markup` says in which turns text is read like this.

    Raises:
        DataError: turns do not alternate, an image is missing, the number of tags is not the number
            of images or objects, or markup cannot be read; or a box has its corners in the wrong
            order, is outside its image or has fractions on the grid. `read_options.on_bad_box` can
            keep or repair such boxes, or have `Dropped` raised.
    """
    _check_roles([role for role, _ in draft.turns])
    turns = read_tags(draft.turns, read_options.markup)
    has_image_items = any(
        role == "assistant" and Placeholder.IMAGE in parts for role, parts in draft.turns
    )
    boxes = BoxReader(read_options.on_bad_box)
    with _naming_keys(draft.notes):
        listed = place_listed_images(turns, draft.images, has_image_items, boxes.notes)
    all_parts = [part for _, parts in turns for part in parts]
    objects = [boxes.read_object(f"object {k}", raw) for k, raw in enumerate(draft.objects, 1)]
    with _naming_keys(draft.notes):
        check_placeholders(all_parts, len(objects), boxes)
    _check_characters(
        [row_id, *draft.references, *columns.values()],
        [image.address for image in draft.images],
        texts_in(all_parts),
        [obj.label or "" for obj in objects],
    )
    images = []
    for role, reference in images_in(turns, listed):
        try:
            images.append(referenced_image(reference, root, read_options))
        except DataError as error:
            if role != "assistant":
                raise
            raise type(error)(f"{error}; {LITERAL_ANSWER}") from None
    for k, obj in enumerate(objects):
        what = f"object {k + 1} ({reprlib.repr(obj.label)})"
        with _naming_keys(draft.notes):
            objects[k] = boxes.check_object(what, obj, images)
    boxes.check_fractions(objects, images)
    reader = TurnReader(images, objects, boxes)
    read_turns = [Turn(role=role, parts=reader.read(role, parts)) for role, parts in turns]
    reader.note_labels()
    notes = draft.notes
    if not images:
        named = named_files(texts_in(all_parts), root)
        notes += draft.notes_without_image or tuple(named)
    return Conversation(
        id=row_id,
        turns=tuple(read_turns),
        references=draft.references,
        options=draft.options,
        columns=columns,
        index=index,
        where=where,
        notes=(*notes, *boxes.notes),
    )


@contextmanager
def _naming_keys(notes: Sequence[str]) -> Iterator[None]:
    """Appends the notes about keys that are not read to an error that they may have caused."""
    try:
        yield
    except DataError as error:
        if not notes:
            raise
        raise type(error)(f"{error}; {'; '.join(notes)}") from None


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


def _check_characters(*texts: Iterable[str]) -> None:
    try:
        "\n".join(chain(*texts)).encode()
    except UnicodeEncodeError as error:
        around = ascii(error.object[max(0, error.start - 20) : error.end + 20])
        raise DataError(
            f"text contains half of a surrogate pair, {error.object[error.start]!a} in {around}; "
            f"write the whole character"
        ) from None


def referenced_image(
    reference: ImageReference, root: Path, read_options: ReadOptions
) -> ImageSource:
    """Returns the image whose bytes are in the row, or that `image_from` finds."""
    if reference.content is not None:
        return ImageSource(reference.content, read_options.image_options)
    return image_from(reference.address, root, read_options)


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
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise BadImage(f"image {file[:1000]} is a folder; give the path of a file")
    if status is None or not stat.S_ISREG(status.st_mode):
        blanks = ""
        if address != address.strip():
            blanks = f"; its path {address[:100]!r} has blanks around it"
        searched = "" if os.path.isabs(file) else f", relative to {Path.cwd()}"
        raise BadImage(
            f"image {str(Path(file))[:1000]} does not exist{searched}; check the path, `data.root` "
            f"and `data.path_map`{blanks}{windows_hint(address)}"
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
