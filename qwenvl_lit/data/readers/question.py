"""What a person says to a model and what it says back: questions of text and images, histories, answers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from qwenvl_lit.data.readers.rows import ReadOptions, image_from
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

ImageLike = str | Path | bytes | Image.Image | ImageSource
Piece = (
    ImageLike | GroundedObject | Mapping[str, ImageLike]
)  # a str is text; {"image": ...} and {"text": ...} say which it is
Query = Piece | Sequence[Piece]
History = Sequence[Sequence[Query]]  # [query, response] pairs, the oldest first

_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")


def conversation(
    query: Query, history: History = (), *, system: str | None = None, read_options: ReadOptions
) -> Conversation:
    """A question after earlier ones and their answers.

    Text may hold `<img>path-or-address</img>`, and `<ref>`, `<box>` and `<quad>` markup, which is in the last image before it; whatever
    else it holds is text. Paths are relative to the current folder.

    Raises:
        DataError: an image does not exist, the history is not made of pairs, or the question is empty.
    """
    turns = [] if system is None else [Turn(role="system", parts=(system,))]
    images = 0
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], str):
            raise DataError(
                f"a history is a list of [query, response] pairs, got {pair!r:.200} in it"
            )
        turns.append(Turn(role="user", parts=parts_of(pair[0], images, read_options)))
        images += _count(turns[-1])
        turns.append(
            Turn(role="assistant", parts=objects_from_tags(pair[1], image=max(images - 1, 0)))
        )
    turns.append(Turn(role="user", parts=parts_of(query, images, read_options)))
    if not turns[-1].parts:
        raise DataError(
            "the question is empty: the text is empty, or the list is; give text, or a list of texts and images"
        )
    return Conversation(id="question", turns=tuple(turns))


def parts_of(query: Query, images_before: int, read_options: ReadOptions) -> tuple[Part, ...]:
    """A question taken apart, as `conversation` says."""
    parts: list[Part] = []
    images = images_before

    def add_text(text: str) -> None:
        parts.extend(objects_from_tags(text, image=max(images - 1, 0)))

    for piece in query if isinstance(query, list | tuple) else [query]:
        match piece:
            case GroundedObject():
                parts.append(piece)
            case str(text) | {"text": str(text)}:
                before, *pairs = _IMAGE.split(text)
                add_text(before)
                for source, after in zip(pairs[::2], pairs[1::2], strict=True):
                    parts.append(image_of(source, read_options))
                    images += 1
                    add_text(after)
            case {"image": source} | source:
                parts.append(image_of(source, read_options))
                images += 1
    return tuple(parts)


def image_of(source: ImageLike, read_options: ReadOptions) -> ImageSource:
    """The image at a path or an address, of encoded bytes, or of Pillow's; a remote one is not fetched yet.

    Raises:
        BadImage: there is no such file.
        DataError: `source` is something else.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, bytes | Image.Image):
        return ImageSource(source)
    if not isinstance(source, str | Path):
        raise DataError(
            f'a question is made of text (str, {{"text": ...}}) and images (Path, bytes, PIL image, {{"image": path or address}}), '
            f"got {type(source).__name__}"
        )
    address = os.path.expanduser(str(source).strip())
    if os.path.isfile(address):
        return ImageSource(Path(address))
    if isinstance(source, Path) or not _ADDRESS.match(address):
        raise BadImage(
            f"image {address[:200]!r} does not exist, seen from {Path.cwd()}; check the path"
        )
    return image_from(address, Path(), read_options)


def _count(turn: Turn) -> int:
    return sum(isinstance(part, ImageSource) for part in turn.parts)
