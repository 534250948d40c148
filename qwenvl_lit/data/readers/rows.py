"""What a row says, taken apart into text, images and grounded objects, and checked."""

from __future__ import annotations

import base64
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import get_args

from qwenvl_lit.data.readers.boxes import LIMITS, Boxes, OnBadBox
from qwenvl_lit.data.readers.layouts import Draft
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.types import (
    BadImage,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Part,
    Turn,
)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How the rows of one dataset are read, whatever their layout."""

    root: Path | None = (
        None  # where relative files and images are looked up; None: beside the file that names them
    )
    path_map: Mapping[str, str] = field(
        default_factory=dict
    )  # how paths and addresses begin on another machine -> how they begin here
    on_bad_box: OnBadBox = "error"
    prompt: str | None = (
        None  # how captions and questions are asked where a layout holds none; None: the reader's default
    )
    cache: Path | None = (
        None  # folder of remote images and indexes of files; None: no remote images, indexes in memory only
    )
    download: bool = True  # remote images may be fetched; false: only what `cache` holds
    seed: int = 0

    def __post_init__(self):
        if self.on_bad_box not in get_args(OnBadBox):
            raise DataError(
                f"on_bad_box is one of {', '.join(get_args(OnBadBox))}, got {self.on_bad_box!r}"
            )


DEFAULT = ReadOptions()

_TAG = re.compile(r"<img>(.*?)</img>|<image>|<ref-object>|<bbox>", re.DOTALL)
_MARKUP = re.compile(r"</?(?:img|ref|box|quad)>")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,")
_BARE_BASE64 = re.compile(
    r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3])[A-Za-z0-9+/\s]{50,}={0,2}\s*"
)  # PNG, JPEG, GIF, WebP, BMP


def conversation_from(
    draft: Draft,
    *,
    id: str,
    root: Path,
    index: int,
    columns: Mapping[str, str],
    where: str = "",
    read_options: ReadOptions = DEFAULT,
) -> Conversation:
    """The conversation of a row.

    - An image is `<img>path</img>` in the text, which stays as it is around it; or an `<image>` tag, which becomes `Picture k: `, the next
      of `images` and a line break, as ms-swift writes it. Without any tag all `images` stand before the first question.
    - The k-th `<ref-object>` is the caption of the k-th object, the k-th `<bbox>` its boxes; both are counted over all turns.
    - `<ref>`, `<box>` and `<quad>` in the text are objects on the grid, in the last image before them.

    Raises:
        DataError: turns do not alternate, an image is missing, tags and what they stand for differ in number, markup cannot be read, a box
            has its corners in the wrong order, is outside its image or has fractions on the grid; `read_options.on_bad_box` may keep or repair
            the latter, and raise Dropped for what it cannot.
    """
    _check_roles([role for role, _ in draft.turns])
    texts = _with_image_tags(draft)
    boxes = Boxes(read_options.on_bad_box)
    objects = [boxes.object(f"object {number}", raw) for number, raw in enumerate(draft.objects, 1)]
    _check_placeholders("\n".join(texts), len(objects), boxes)
    _check_characters(
        [
            id,
            *texts,
            *draft.images,
            *draft.references,
            *columns.values(),
            *(thing.label or "" for thing in objects),
        ]
    )
    images = [
        image_from(address, root, read_options) for address in _addresses(texts, draft.images)
    ]
    objects = [
        boxes.settled(f"object {number} ({reprlib.repr(thing.label)})", thing, images)
        for number, thing in enumerate(objects, 1)
    ]
    reader = _TextReader(images, objects, boxes)
    turns = tuple(
        Turn(role=role, parts=reader.parts(text))
        for (role, _), text in zip(draft.turns, texts, strict=True)
    )
    return Conversation(
        id=id,
        turns=turns,
        references=draft.references,
        options=draft.options,
        columns=columns,
        index=index,
        where=where,
        notes=tuple(boxes.notes),
    )


def _check_roles(roles: Sequence[str]) -> None:
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise DataError("there is no turn; expected at least a question")
    for number, role in enumerate(spoken):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(
                f"turns go user, assistant, user, ..., at most one system turn before them; got {', '.join(roles)}"
            )


def _with_image_tags(draft: Draft) -> list[str]:
    texts = [text for _, text in draft.turns]
    tags = sum(text.count("<image>") for text in texts)
    if tags == len(draft.images):
        return texts
    if tags:
        raise DataError(
            f"{tags} <image> tags for {len(draft.images)} `images`; write one tag for each, or none to have all before the first question"
        )
    first = [role for role, _ in draft.turns].index("user")
    texts[first] = "<image>" * len(draft.images) + texts[first]
    return texts


def _check_placeholders(text: str, objects: int, boxes: Boxes) -> None:
    labels, places = text.count("<ref-object>"), text.count("<bbox>")
    if max(labels, places) < objects and boxes.on_bad_box == "keep":
        boxes.notes.append(f"{objects - max(labels, places)} of {objects} `objects` are not used")
    elif max(labels, places) != objects:
        raise boxes.fault(
            f"{labels} <ref-object> and {places} <bbox> for {objects} `objects`; the k-th placeholder of a kind stands for the k-th "
            f"object, and each object needs one"
        )


def _check_characters(texts: Sequence[str]) -> None:
    try:
        "\n".join(texts).encode()
    except UnicodeEncodeError as fault:
        around = ascii(fault.object[max(0, fault.start - 20) : fault.end + 20])
        raise DataError(
            f"text holds half a character, {fault.object[fault.start]!a} in {around}; write it whole"
        ) from None


def _addresses(texts: Sequence[str], images: Sequence[str]) -> Iterator[str]:
    """Where the images are, in the order of their tags."""
    listed = iter(images)
    for text in texts:
        for tag in _TAG.finditer(text):
            if tag.group() == "<image>":
                yield next(listed)
            elif tag.group(1) is not None:
                yield tag.group(1)


class _TextReader:
    """Takes the texts of one conversation apart, in order."""

    def __init__(
        self, images: Sequence[ImageSource], objects: Sequence[GroundedObject], boxes: Boxes
    ):
        self._images = images
        self._shown = 0
        self._labels = iter(objects)
        self._places = iter(objects)
        self._boxes = boxes

    def parts(self, text: str) -> tuple[Part, ...]:
        if "<" not in text:  # most are; rows are read anew each time they are fetched
            return (text,) if text else ()
        parts: list[Part] = []
        end = 0
        for tag in _TAG.finditer(text):
            self._add_text(parts, text[end : tag.start()])
            end = tag.end()
            match tag.group():
                case "<ref-object>":
                    thing = next(self._labels)
                    if thing.label is None:
                        raise self._boxes.fault(
                            "a <ref-object> stands for an object without `caption`"
                        )
                    _add(parts, GroundedObject(label=thing.label, image=thing.image))
                case "<bbox>":
                    thing = next(self._places)
                    _add(parts, GroundedObject(boxes=thing.boxes, image=thing.image))
                case "<image>":
                    _add(parts, f"Picture {self._shown + 1}: ")
                    self._add_image(parts)
                    _add(parts, "\n")
                case _:
                    self._add_image(parts)
        self._add_text(parts, text[end:])
        return tuple(parts)

    def _add_image(self, parts: list[Part]) -> None:
        parts.append(self._images[self._shown])
        self._shown += 1

    def _add_text(self, parts: list[Part], text: str) -> None:
        if "<" not in text:
            _add(parts, text)
            return
        for part in objects_from_tags(text, image=max(0, self._shown - 1), fractions=True):
            if isinstance(part, GroundedObject):
                part = self._settled(part)
            elif stray := _MARKUP.search(part):
                raise self._boxes.fault(
                    f"cannot read {part[stray.start() :][:60]!r}; expected <img>path</img>, <ref>label</ref>, <box>(x1,y1),(x2,y2)</box> "
                    f"or <quad> with four points, of whole numbers"
                )
            _add(parts, part)

    def _settled(self, thing: GroundedObject) -> GroundedObject:
        if thing.boxes and not self._images:
            if self._boxes.on_bad_box != "keep":
                raise self._boxes.fault(
                    "there is a box but no image; write <img>path</img> into the question or give `images`; or take such boxes as they "
                    "are, data.on_bad_box=keep, or leave their rows out, data.on_bad_box=drop"
                )
            self._boxes.notes.append("text: there is a box but no image; kept as it is")
        boxes = tuple(self._boxes.settled_box("text", box, LIMITS["grid"]) for box in thing.boxes)
        return GroundedObject(label=thing.label, boxes=boxes, image=thing.image)


def image_from(address: str, root: Path, read_options: ReadOptions = DEFAULT) -> ImageSource:
    """The image at a path within `root` (unless absolute), at a web address, or in the address itself as base64.

    A remote image is not fetched yet.

    Raises:
        BadImage: there is no such file, or the base64 text is broken.
        DataError: an image is remote and there is no cache to keep it in, or its address is of another kind.
    """
    address = _mapped(address, read_options.path_map)
    if inline := _DATA_URI.match(address) or _BARE_BASE64.fullmatch(address):
        text = address[inline.end() :] if address.startswith("data:") else address
        return ImageSource(_decoded("".join(text.split())))
    scheme = _SCHEME.match(address)
    if scheme and scheme[1].lower() in ("http", "https"):
        if read_options.cache is None:
            raise DataError(
                f"image {address[:100]!r} is remote, and there is no folder to keep it in; set data.cache, or give a file"
            )
        from qwenvl_lit.data.download.files import RemoteImage

        return ImageSource(
            RemoteImage(address, read_options.cache / "images", read_options.download)
        )
    if scheme and scheme[1].lower() == "file":
        address = address[scheme.end() :]
    elif scheme or address.startswith("data:"):
        raise DataError(
            f"image {address[:100]!r} is not a file, an http(s) address or base64 data; download it and give its path"
        )
    file = os.path.join(root, address)
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise BadImage(
            f"image {file[:1000]} does not exist; check the path, `data.root` and `data.path_map`"
        )
    return _image_file(file, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=1 << 16)
def _image_file(file: str, version: tuple[int, ...]) -> ImageSource:
    """Remembered, with its size once that is known: opening a file takes longer than all the rest of a row."""
    return ImageSource(Path(file))


def _mapped(address: str, path_map: Mapping[str, str]) -> str:
    """`address` with the longest prefix that `path_map` knows replaced; a prefix ends where a name ends."""
    for prefix in sorted(path_map, key=len, reverse=True):
        stem = prefix.rstrip("/\\")
        rest = address[len(stem) :]
        if address.startswith(stem) and (not rest or rest[0] in "/\\"):
            rest = rest.replace("\\", "/") if "\\" in prefix else rest
            return path_map[prefix].rstrip("/") + rest if path_map[prefix] else rest.lstrip("/")
    return address


def _decoded(text: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as fault:
        raise BadImage(f"image {text[:40]!r}... is not base64: {fault}") from None
    if not content:
        raise BadImage("an image is given as base64, but empty")
    return content


def _add(parts: list[Part], part: Part) -> None:
    """Append; text continues text, and boxes right behind an object of the same image are its boxes, as they read in the markup."""
    last = parts[-1] if parts else None
    if isinstance(part, str):
        if isinstance(last, str):
            parts[-1] = last + part
        elif part:
            parts.append(part)
    elif _continues(part, last):
        parts[-1] = GroundedObject(
            label=last.label, boxes=last.boxes + part.boxes, image=part.image
        )
    else:
        parts.append(part)


def _continues(part: Part, last: Part | None) -> bool:
    if (
        not (isinstance(part, GroundedObject) and isinstance(last, GroundedObject))
        or part.label is not None
    ):
        return False
    return part.image == last.image or not last.boxes
