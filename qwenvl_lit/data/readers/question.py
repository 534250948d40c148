"""Questions asked of a model: text and images, after a history of earlier questions and answers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_lit.data.readers.drafts import Placeholder
from qwenvl_lit.data.readers.markup import split_at_tags, stray_markup
from qwenvl_lit.data.readers.rows import ReadOptions, image_from
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.types import (
    QUESTION_ID,
    BadImage,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Part,
    Turn,
)

ImageLike = str | Path | bytes | Image.Image | ImageSource
# A plain str is text. {"image": ...} and {"text": ...} name the type, as do the content items of
# OpenAI's API, {"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": ...}}.
Piece = ImageLike | GroundedObject | Mapping[str, Any]
Query = Piece | Sequence[Piece]
History = Sequence[Sequence[Query]]  # [question, answer] pairs, oldest first

RUN_KEYS = ("exif", "markup", "on_deep_image", "user_agent")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")


def question_options(
    cache: str | Path | None = None, data: Mapping[str, Any] | None = None
) -> ReadOptions:
    """Returns how questions are read: as the rows of `data`, the config of a run's data.

    With a mixture, they are read as those of its first dataset. Markup in questions is read in any
    case, since a chat has no other way to name an image.

    Args:
        cache: folder of downloaded images; None: that of the commands, see conf/common.yaml.
    """
    cache = cache or os.environ.get("QWENVL_LIT_CACHE") or "~/.cache/qwenvl_lit"
    settings = dict(data or {})
    if settings.get("datasets"):
        settings = dict(next(iter(settings["datasets"].values())))
    chosen = {key: settings[key] for key in RUN_KEYS if key in settings}
    if chosen.get("markup") == "none":
        chosen["markup"] = "questions"
    return ReadOptions(cache=Path(cache).expanduser(), **chosen)


def conversation(
    query: Query,
    history: History | None = None,
    *,
    system: str | None = None,
    read_options: ReadOptions,
) -> Conversation:
    """Returns a question after earlier questions and their answers.

    Text may contain `<img>path-or-address</img>`; and `<ref>`, `<box>` and `<quad>` markup, which
    refers to the last image before it. Other tags stay text. Paths are relative to the current
    folder. `read_options.markup` says where this is read: in "all" texts, in "questions" (not in
    answers of the history), or in "none".

    Raises:
        DataError: an image does not exist, markup of a question cannot be read, the history is not
            a list of pairs, text is not valid Unicode, or the question is empty.
    """
    turns = []
    if system is not None:
        turns.append(Turn(role="system", parts=(valid_text(system, "system message"),)))
    if not isinstance(history, list | tuple | None):
        raise DataError(
            f"a history must be a list of [question, answer] pairs, got {type(history).__name__}"
        )
    images = 0
    for pair in history or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], str):
            raise DataError(
                f"a history must be a list of [question, answer] pairs, got {pair!r:.200} in it"
            )
        question = parts_of(pair[0], images, read_options)
        images += sum(isinstance(part, ImageSource) for part in question)
        text = valid_text(pair[1], "history")
        answer: tuple[Part, ...] = (text,)
        if read_options.markup == "all":
            answer = objects_from_tags(text, image=max(images - 1, 0))
        turns += [Turn(role="user", parts=question), Turn(role="assistant", parts=answer)]
    question = parts_of(query, images, read_options)
    if not question:
        raise DataError(
            "the question is empty: the text or the list has no content; give text, or a list of "
            "texts and images"
        )
    turns.append(Turn(role="user", parts=question))
    return Conversation(id=QUESTION_ID, turns=tuple(turns))


def parts_of(query: Query, images_before: int, read_options: ReadOptions) -> tuple[Part, ...]:
    """Returns the parts of a question, as described in `conversation`.

    Args:
        images_before: number of images in earlier turns.
    """
    parts: list[Part] = []
    images = images_before

    def add_text(text: str) -> None:
        text = valid_text(text, "question")
        if "<img>" in text:
            unclosed = text[text.index("<img>") :]
            raise DataError(f"{unclosed[:100]!r} has no </img>; write <img>path</img>")
        read = objects_from_tags(text, image=max(images - 1, 0))
        for part in read:
            if isinstance(part, str) and (problem := stray_markup(part)):
                raise DataError(f"the question: {problem}")
        parts.extend(read)

    for piece in query if isinstance(query, list | tuple) else [query]:
        match piece:
            case GroundedObject():
                parts.append(piece)
            case str(text) | {"text": str(text)} if read_options.markup == "none":
                parts.append(valid_text(text, "question"))
            case str(text) | {"text": str(text)}:
                plain = ""
                for before, tag in split_at_tags(text):
                    plain += before
                    if isinstance(tag, Placeholder):  # stands for nothing in a question
                        plain += tag.value
                        continue
                    add_text(plain)
                    plain = ""
                    if tag is not None:
                        parts.append(image_of(tag, read_options))
                        images += 1
            case (
                {"type": "image_url", "image_url": {"url": source}}
                | {"type": "image_url", "image_url": source}
                | {"type": "image", "path": source}
                | {"type": "image", "url": source}
                | {"image": source}
                | source
            ):
                parts.append(image_of(source, read_options))
                images += 1
    return tuple(parts)


def image_of(source: ImageLike, read_options: ReadOptions) -> ImageSource:
    """Returns the image at a path or an address, of encoded bytes, or of Pillow.

    A remote image is not fetched yet.

    Raises:
        BadImage: there is no such file.
        DataError: `source` has another type.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, bytes | Image.Image):
        return ImageSource(source, read_options.image_options)
    if not isinstance(source, str | Path):
        got = f"{source!r:.100}" if isinstance(source, dict) else type(source).__name__
        raise DataError(
            f'a question consists of text (str, {{"text": ...}}) and images (Path, bytes, PIL '
            f'image, {{"image": path or address}}, {{"type": "image_url", "image_url": '
            f'{{"url": ...}}}}), got {got}; of a message with a role, give the content'
        )
    address = os.path.expanduser(str(source).strip())
    if os.path.isfile(address):
        return ImageSource(Path(address), read_options.image_options)
    if isinstance(source, Path) or not _ADDRESS.match(address):
        raise BadImage(
            f"image {address[:200]!r} does not exist, relative to {Path.cwd()}; check the path"
        )
    return image_from(address, Path(), read_options)


def valid_text(text: str, name: str) -> str:
    """Returns `text`.

    Raises:
        DataError: it is no text, or it holds what Python makes of bytes that are not UTF-8.
    """
    if not isinstance(text, str):
        raise DataError(f"the {name} must be text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        before = text[max(error.start - 20, 0) : error.start]
        raise DataError(
            f"the {name} is not valid UTF-8: it has {found} after {before!r}; convert the text, "
            f"for example with iconv -f latin1 -t utf-8"
        ) from None
    return text
