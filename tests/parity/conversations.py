"""Converts recorded texts to conversations, and samples to a form that can be compared.

An image's span is filled in different ways here and in the original. In a sample it is replaced by
one entry."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from parity.reasons import REFUSED
from parity.result import UnreadableError, read
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Part, Turn

FRAMES = {"real": "pixel", "norm_1000": "grid", "norm_1": "unit"}
# The entry of an image's span in a sample. `deviations.json` has it, and hence the word.
SPAN = "picture of {} tokens"


class File(NamedTuple):
    """A recorded file and its vocabulary."""

    data: dict[str, Any]
    tokenizer: QwenTokenizer


@cache
def _tokenizer(path: Path) -> QwenTokenizer:
    return QwenTokenizer(path)


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def opened(path: Path) -> File:
    """Reads a recorded file, and the vocabulary that it names.

    The published vocabulary is in the PyPI package `dashscope`.

    Raises:
        UnreadableError: the file is broken, or its vocabulary is missing or is another one.
    """
    data = read(path)
    vocabulary = path.parent.parent / "tokenizer" / "synthetic.tiktoken"
    if data.get("vocab") == "qwen.tiktoken":
        package = find_spec("dashscope")
        if package is None or package.origin is None:
            raise UnreadableError(
                "needs the published vocabulary: pip install dashscope (the extra `test` has it)"
            )
        vocabulary = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    if not vocabulary.exists():
        raise UnreadableError(f"needs {vocabulary.name}")
    if data.get("vocab_sha256", _sha256(vocabulary)) != _sha256(vocabulary):
        raise UnreadableError(f"was made with another {vocabulary.name}")
    return File(data, _tokenizer(vocabulary))


def blank(path: str, sizes: dict[str, list[int]] | None = None) -> ImageSource:
    """Returns an image of the recorded size. Its content has no influence on tokens."""
    width, height = (sizes or {}).get(path, (14, 14))
    return ImageSource(Image.new("RGB", (width, height)))


def parts(text: str, image: Callable[[str], ImageSource] = blank) -> tuple[Part, ...]:
    """Splits a text with `<img>path</img>` and box markup into parts."""
    content: list[Part] = []
    for index, piece in enumerate(re.split("<img>(.*?)</img>", text)):
        content += [image(piece)] if index % 2 else objects_from_tags(piece)
    return tuple(content)


def conversation(
    name: str, contents: Sequence[Sequence[Part] | None], system: str | None = None
) -> Conversation:
    """Builds a conversation of a question, an answer, a question, ...; None is left out."""
    turns = [] if system is None else [Turn(role="system", parts=parts(system))]
    for index, content in enumerate(contents):
        if content is not None:
            turns.append(Turn(role=("user", "assistant")[index % 2], parts=tuple(content)))
    return Conversation(id=name, turns=tuple(turns))


def sample(
    processor: QwenVLProcessor, talk: Conversation, *, prompt: bool = False
) -> dict[str, Any]:
    """Returns our ids and labels, with each image's span as one entry."""
    try:
        encoded = processor.encode(talk, prompt=prompt)
    except DataError:
        return REFUSED
    ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
    result = {"ids": spans_closed(ids, processor.tokenizer)}
    if not prompt:
        result["labels"] = labels_closed(ids, labels, processor.tokenizer)
    return result


def golden_sample(case: dict[str, Any], tokenizer: QwenTokenizer) -> dict[str, Any]:
    """Returns the recorded ids and labels in the same form."""
    if case.get("input_ids") is None:
        return REFUSED
    result = {"ids": spans_closed(case["input_ids"], tokenizer)}
    if case["labels"] is not None:
        result["labels"] = labels_closed(case["input_ids"], case["labels"], tokenizer)
    return result


def _spans_replaced(
    ids: Sequence[int], tokenizer: QwenTokenizer, written: Callable[[list[int]], str]
) -> list[int | str]:
    """Replaces each image's span and its tags by one string.

    Args:
        written: returns the string for the ids between the tags.
    """
    out: list[int | str] = []
    rest = list(ids)
    while rest:
        out.append(rest.pop(0))
        if out[-1] == tokenizer.img_start_id and tokenizer.img_end_id in rest:
            end = rest.index(tokenizer.img_end_id)
            out[-1], rest = written(rest[:end]), rest[end + 1 :]
    return out


def spans_closed(ids: Sequence[int], tokenizer: QwenTokenizer) -> list[int | str]:
    """Replaces each image's span by its length; the ids between the tags do not matter."""
    return _spans_replaced(ids, tokenizer, lambda span: SPAN.format(len(span)))


def labels_closed(
    ids: Sequence[int], labels: Sequence[int], tokenizer: QwenTokenizer
) -> list[int | str | None]:
    """Returns the labels: None if not supervised, and one entry, "image" or None, for a span."""
    out: list[int | str | None] = []
    inside = False
    for token_id, label in zip(ids, labels, strict=True):
        starts = token_id == tokenizer.img_start_id
        if not inside and label < 0:
            out.append(None)
        elif not inside:
            out.append("image" if starts else label)
        inside = starts or (inside and token_id != tokenizer.img_end_id)
    return out


def paths_read(ids: Sequence[int], tokenizer: QwenTokenizer, *, in_bytes: bool) -> list[int | str]:
    """Replaces each image's span by the text in it.

    Args:
        in_bytes: the span holds the bytes of a path, as the original writes it.
    """

    def written(span: list[int]) -> str:
        path = [token_id for token_id in span if token_id != tokenizer.img_pad_id]
        try:
            return f"<img>{bytes(path).decode() if in_bytes else tokenizer.decode(path)}</img>"
        except ValueError:  # ids that are no bytes, or bytes that are not UTF-8
            return f"<img>{path}</img>"

    return _spans_replaced(ids, tokenizer, written)


def swift_sample(
    processor: QwenVLProcessor, case: dict[str, Any], sizes: dict[str, list[int]]
) -> dict[str, Any]:
    """Returns our sample of a row in ms-swift's form. A row that cannot be read is refused."""
    row = case["example"]
    try:
        talk = _swift_conversation(case["name"], row, sizes)
    except (IndexError, KeyError, TypeError, ValueError):
        # More tags than images or objects, or objects that are not in the format.
        return REFUSED
    return sample(processor, talk, prompt="response" not in row)


def _swift_conversation(
    name: str, row: dict[str, Any], sizes: dict[str, list[int]]
) -> Conversation:
    texts = [*chain.from_iterable(row.get("history") or ()), row["query"]]
    if "response" in row:
        texts.append(row["response"])
    images = row.get("images", [])
    if isinstance(images, str):
        images = [images]
    missing_tags = len(images) - "".join(texts).count("<image>")
    texts[0] = "<image>" * missing_tags + texts[0]
    objects = _swift_objects(row.get("objects", []))
    left = {"<image>": list(images), "<ref-object>": list(objects), "<bbox>": list(objects)}

    def split(text: str) -> Iterator[Part]:
        for piece in re.split("(<image>|<img>.*?</img>|<ref-object>|<bbox>)", text):
            if piece == "<image>":
                yield blank(left[piece].pop(0), sizes)
            elif piece.startswith("<img>"):
                yield blank(piece)
            elif piece == "<ref-object>":
                yield GroundedObject(label=left[piece].pop(0)["caption"])
            elif piece == "<bbox>":
                yield _swift_boxes(left[piece].pop(0))
            else:
                yield from objects_from_tags(piece)

    return conversation(name, [list(split(text)) for text in texts], row.get("system"))


def _swift_objects(objects: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns objects as mappings; in JSON they may be pairs of a caption and a box on the grid."""
    if not isinstance(objects, str):
        return objects
    mappings = []
    for item in json.loads(objects):
        if isinstance(item, dict):
            mappings.append(item)
        else:
            caption, bbox = item[:2]
            mappings.append(
                {"caption": caption, "bbox": bbox, "bbox_type": "norm_1000", "image": 0}
            )
    return mappings


def _swift_boxes(item: dict[str, Any]) -> GroundedObject:
    several = item["bbox"] if isinstance(item["bbox"][0], list) else [item["bbox"]]
    frame = FRAMES[item["bbox_type"]]
    boxes = [Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=frame) for x0, y0, x1, y1 in several]
    return GroundedObject(boxes=tuple(boxes), image=item["image"])
