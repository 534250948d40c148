"""Recorded texts as conversations, and samples in a form that does not depend on how an image's span is filled."""

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

from parity.result import UnreadableError, read
from qwenvl_lit.grounding import objects_from_tags
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, ImageSource, Part, Turn

FRAMES = {"real": "pixel", "norm_1000": "grid", "norm_1": "unit"}
REFUSED = {"refused": True}


class File(NamedTuple):
    """A recorded file and the vocabulary it belongs to."""

    data: dict[str, Any]
    tokenizer: QwenTokenizer


@cache
def _tokenizer(path: Path) -> QwenTokenizer:
    return QwenTokenizer(path)


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def opened(path: Path) -> File:
    """A recorded file with the vocabulary that it names: the published one comes with the PyPI package `dashscope`.

    Raises:
        UnreadableError: the file is broken, or its vocabulary is missing or another one.
    """
    data = read(path)
    vocabulary = path.parent.parent / "tokenizer" / "synthetic.tiktoken"
    if data.get("vocab") == "qwen.tiktoken":
        package = find_spec("dashscope")
        if package is None or package.origin is None:
            raise UnreadableError(
                "needs the published vocabulary: pip install dashscope (it is among the extra `test`)"
            )
        vocabulary = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    if not vocabulary.exists():
        raise UnreadableError(f"needs {vocabulary.name}")
    if data.get("vocab_sha256", _sha256(vocabulary)) != _sha256(vocabulary):
        raise UnreadableError(f"was made with another {vocabulary.name}")
    return File(data, _tokenizer(vocabulary))


def blank(path: str, sizes: dict[str, list[int]] | None = None) -> ImageSource:
    """An image of the recorded size; what is in it changes no token."""
    width, height = (sizes or {}).get(path, (14, 14))
    return ImageSource(Image.new("RGB", (width, height)))


def parts(text: str, image: Callable[[str], ImageSource] = blank) -> tuple[Part, ...]:
    """Text with `<img>path</img>` and box markup, parted."""
    pieces = enumerate(re.split("<img>(.*?)</img>", text))
    return tuple(
        part
        for place, piece in pieces
        for part in ([image(piece)] if place % 2 else objects_from_tags(piece))
    )


def conversation(
    name: str, contents: Sequence[Sequence[Part] | None], system: str | None = None
) -> Conversation:
    """A question, an answer, a question, ...; None is left out."""
    first = [] if system is None else [Turn(role="system", parts=parts(system))]
    turns = [
        Turn(role=("user", "assistant")[place % 2], parts=tuple(content))
        for place, content in enumerate(contents)
        if content is not None
    ]
    return Conversation(id=name, turns=(*first, *turns))


def sample(
    processor: QwenVLProcessor, talk: Conversation, *, prompt: bool = False
) -> dict[str, Any]:
    """Our ids and labels, each image's span as one entry."""
    try:
        encoded = processor.encode(talk, prompt=prompt)
    except DataError:
        return REFUSED
    found = {"ids": spans_closed(encoded.input_ids.tolist(), processor.tokenizer)}
    if not prompt:
        found["labels"] = labels_closed(
            encoded.input_ids.tolist(), encoded.labels.tolist(), processor.tokenizer
        )
    return found


def golden_sample(case: dict[str, Any], tokenizer: QwenTokenizer) -> dict[str, Any]:
    """The recorded ids and labels in the same form."""
    if case.get("input_ids") is None:
        return REFUSED
    found = {"ids": spans_closed(case["input_ids"], tokenizer)}
    if case["labels"] is not None:
        found["labels"] = labels_closed(case["input_ids"], case["labels"], tokenizer)
    return found


def _spans_replaced(
    ids: Sequence[int], tokenizer: QwenTokenizer, written: Callable[[list[int]], str]
) -> list[int | str]:
    """`ids` with what is `written` of the ids between the tags of each image in place of them and their tags."""
    out: list[int | str] = []
    rest = list(ids)
    while rest:
        out.append(rest.pop(0))
        if out[-1] == tokenizer.img_start_id and tokenizer.img_end_id in rest:
            end = rest.index(tokenizer.img_end_id)
            out[-1], rest = written(rest[:end]), rest[end + 1 :]
    return out


def spans_closed(ids: Sequence[int], tokenizer: QwenTokenizer) -> list[int | str]:
    """`ids` with how many there are between the tags of each image in place of them, whatever they are."""
    return _spans_replaced(ids, tokenizer, lambda span: f"image of {len(span)} tokens")


def labels_closed(
    ids: Sequence[int], labels: Sequence[int], tokenizer: QwenTokenizer
) -> list[int | str | None]:
    """Labels with None where nothing is learned; one entry, "image" or None, for a span."""
    out: list[int | str | None] = []
    inside = False
    for id, label in zip(ids, labels, strict=True):
        if not inside:
            out.append(None if label < 0 else "image" if id == tokenizer.img_start_id else label)
        inside = id == tokenizer.img_start_id or (inside and id != tokenizer.img_end_id)
    return out


def paths_read(ids: Sequence[int], tokenizer: QwenTokenizer, *, in_bytes: bool) -> list[int | str]:
    """`ids` with the text of each image's span in place of its ids; `in_bytes`: as the original writes a path there."""

    def written(span: list[int]) -> str:
        path = [id for id in span if id != tokenizer.img_pad_id]
        return f"<img>{bytes(path).decode() if in_bytes else tokenizer.decode(path)}</img>"

    return _spans_replaced(ids, tokenizer, written)


def swift_sample(
    processor: QwenVLProcessor, case: dict[str, Any], sizes: dict[str, list[int]]
) -> dict[str, Any]:
    """Our sample of a row in ms-swift's form; one that cannot be read is refused."""
    row = case["example"]
    texts = [
        *chain.from_iterable(row.get("history") or ()),
        row["query"],
        *([row["response"]] if "response" in row else []),
    ]
    images = [row["images"]] if isinstance(row.get("images"), str) else row.get("images", [])
    texts[0] = "<image>" * (len(images) - "".join(texts).count("<image>")) + texts[0]
    objects = row.get("objects", [])
    if isinstance(objects, str):
        pairs = {"bbox_type": "norm_1000", "image": 0}
        objects = [
            item if isinstance(item, dict) else {"caption": item[0], "bbox": item[1], **pairs}
            for item in json.loads(objects)
        ]
    left = {"<image>": list(images), "<ref-object>": list(objects), "<bbox>": list(objects)}

    def parted(text: str) -> Iterator[Part]:
        for piece in re.split("(<image>|<img>.*?</img>|<ref-object>|<bbox>)", text):
            if piece == "<image>":
                yield blank(left[piece].pop(0), sizes)
            elif piece.startswith("<img>"):
                yield blank(piece)
            elif piece == "<ref-object>":
                yield GroundedObject(label=left[piece].pop(0)["caption"])
            elif piece == "<bbox>":
                item = left[piece].pop(0)
                values = item["bbox"] if isinstance(item["bbox"][0], list) else [item["bbox"]]
                boxes = [
                    Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=FRAMES[item["bbox_type"]])
                    for x0, y0, x1, y1 in values
                ]
                yield GroundedObject(boxes=tuple(boxes), image=item["image"])
            else:
                yield from objects_from_tags(piece)

    try:
        talk = conversation(case["name"], [list(parted(text)) for text in texts], row.get("system"))
    except (IndexError, TypeError):  # more tags than things, or pairs outside of JSON
        return REFUSED
    return sample(processor, talk, prompt="response" not in row)
