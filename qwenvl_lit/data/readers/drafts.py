"""Drafts of rows: what a layout finds in a row, before tags and markup in the text are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qwenvl_lit.images import StoredImage
from qwenvl_lit.types import Role


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image by its path, its web address or its content in base64.

    An image whose bytes are in the row has `content`; its address is then only its name.
    """

    address: str
    content: bytes | StoredImage | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that holds neither tags nor markup, whatever it spells."""

    text: str


class Placeholder(Enum):
    """Stands for the next entry of one of the row's lists. Its value is the tag in text."""

    IMAGE = "<image>"  # the next of `Draft.images`
    LABEL = "<ref-object>"  # the label of the next of `Draft.objects`
    BOXES = "<bbox>"  # the boxes of the next of `Draft.objects`, counted apart from the labels


DraftPart = str | PlainText | ImageReference | Placeholder
DraftTurn = tuple[Role, Sequence[DraftPart]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """The content of a row after its keys were read.

    Its text, images and objects are not yet parsed.

    Text is the user's own: it may still hold tags (`<img>path</img>` and those of `Placeholder`)
    and the markup of objects.
    """

    turns: Sequence[DraftTurn]
    images: Sequence[ImageReference] = ()  # for `Placeholder.IMAGE`
    objects: Sequence[Any] = ()  # as written in the row, for `Placeholder.LABEL` and `BOXES`
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what looks wrong about the keys of the row
    notes_without_image: tuple[str, ...] = ()  # further ones, if the row turns out to have no image
