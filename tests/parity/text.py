"""Text to ids and back, padding, and images and boxes as lists."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parity import reasons
from parity.conversations import blank, opened, parts, paths_read
from parity.result import Result, same
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.grounding import tags_from_object
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import (
    Box,
    Conversation,
    GroundedObject,
    ImageSource,
    Part,
    Quad,
    Sample,
    Turn,
)


def encode(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer = file.tokenizer
    tags = [name for name, token_id in tokenizer.special.items() if token_id in tokenizer.tag_ids]
    allowed_special = {"ids": tokenizer.special, "ids_image_tags_only": [*tags, "<img>", "</img>"]}
    decoded = {
        "decoded": {},
        "decoded_skip_special": {"skip_special": True},
        "decoded_skip_special_keep_image_special": {
            "skip_special": True,
            "keep": tokenizer.tag_ids,
        },
    }
    for case in file.data["cases"]:
        golden, ours, text = {}, {}, case["text"]
        for key, allowed in allowed_special.items():
            if key in case:
                golden[key] = case[key]
                if not reasons.is_error(case[key]):
                    golden[key] = paths_read(case[key], tokenizer, in_bytes=True)
                ids = tokenizer.encode(text, allowed_special=allowed)
                ours[key] = paths_read(ids, tokenizer, in_bytes=False)
        if "decoded" in case:
            last = text
            for key, options in decoded.items():
                # True: as the text; missing: as the value before.
                last = text if case.get(key) is True else case.get(key, last)
                golden[key], ours[key] = last, tokenizer.decode(case["ids"], **options)
            golden["streamed"] = golden["decoded"]
            ours["streamed"] = "".join(tokenizer.stream(case["ids"]))
        yield same(text, "ids and text", ours, golden, partial(reasons.encode, text))


def decode(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer = file.tokenizer
    options = {
        "replace": {},
        "ignore": {"errors": "ignore"},
        "skip_special": {"skip_special": True},
        "keep_image_special": {"skip_special": True, "keep": tokenizer.tag_ids},
    }
    for case in file.data["cases"]:
        ours = {key: tokenizer.decode(case["ids"], **option) for key, option in options.items()}
        golden = {key: case[key] for key in options}
        explain = partial(reasons.decode, case["ids"], tokenizer)
        yield same(json.dumps(case["ids"]), "text", ours, golden, explain)


def special_tokens(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer, data = file.tokenizer, file.data
    ours = {
        "n_mergeable": tokenizer.pad_id,
        "n_vocab": tokenizer.vocab_size,
        "eod_id": tokenizer.pad_id,
        "im_start_id": tokenizer.im_start_id,
        "im_end_id": tokenizer.im_end_id,
        "image_start_id": tokenizer.img_start_id,
        "image_end_id": tokenizer.img_end_id,
        "image_pad_id": tokenizer.img_pad_id,
        "image_token_span": QwenVLProcessor(tokenizer).tokens_per_image,
        "special_tokens": tokenizer.special,
    }
    yield from (same(key, "ids", value, data[key]) for key, value in ours.items())


def batch(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer, nobody = file.tokenizer, Conversation(id="", turns=())
    none = torch.empty(0, dtype=torch.int64)
    yield same("pad_token_id", "ids", tokenizer.pad_id, file.data["pad_token_id"])
    for case in file.data["cases"]:
        rows = [
            torch.tensor(tokenizer.encode(text, allowed_special=tokenizer.special))
            for text in case["texts"]
        ]
        samples = [
            Sample(conversation=nobody, input_ids=ids, labels=ids, vision_positions=none, vision={})
            for ids in rows
        ]
        padded = Pad(
            pad_id=tokenizer.pad_id, collate_vision=concatenate_vision, side=case["padding_side"]
        )(samples)
        ours = {
            "input_ids": padded.input_ids.tolist(),
            "attention_mask": padded.attention_mask.tolist(),
        }
        golden = {key: case[key] for key in ours}
        yield same(json.dumps(case["texts"]) + case["padding_side"], "ids and mask", ours, golden)


def written(content: Sequence[Part]) -> str:
    """Returns parts as the text that the processor tokenizes."""
    processor = QwenVLProcessor(QwenTokenizer(TINY_VOCABULARY), image_size=14)
    turn = Turn(role="assistant", parts=tuple(content))
    return processor.decode([], Conversation(id="", turns=(turn,))).reference or ""


def written_list(items: Sequence[dict[str, Any]]) -> str | dict[str, str]:
    """Returns a list in the original's form as text, or an error if it cannot be written."""
    try:
        return written([_part(item) for item in items])
    except (KeyError, TypeError, ValueError):
        return {"error": "ValueError"}


def _part(item: dict[str, Any]) -> Part:
    if "image" in item:
        return blank(item["image"])
    if "text" in item:
        return item["text"]
    boxes: list[Box | Quad] = []
    for x0, y0, x1, y1 in item.get("box", ()):
        boxes.append(Box(x0=x0, y0=y0, x1=x1, y1=y1, frame="grid"))
    for values in item.get("quad", ()):
        points = tuple(zip(values[::2], values[1::2], strict=True))
        boxes.append(Quad(points=points, frame="grid"))
    return GroundedObject(label=item.get("ref"), boxes=tuple(boxes))


def from_list_format(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        golden = _without_paths(case["ok"]) if "ok" in case else {"error": case["error"]}
        name = json.dumps(case["arg"], ensure_ascii=False)
        explain = partial(reasons.text_of_list, case["arg"], written_list)
        yield same(name, "text", written_list(case["arg"]), golden, explain)


def to_list_format(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        ours: list[dict[str, str]] = []
        text = unicodedata.normalize("NFC", case["text"])
        for part in parts(text, lambda name: ImageSource(Path(name))):
            if isinstance(part, str):
                ours.append({"text": part})
            elif isinstance(part, ImageSource):
                ours.append({"image": str(part.source) if part.source.parts else ""})
            else:
                ours += [{"ref": part.label}] if part.label is not None else []
                for box in part.boxes:
                    tag, inner, _ = tags_from_object(GroundedObject(boxes=(box,)), ())
                    ours.append({tag.value.strip("<>"): inner})
        golden = case["ok"] if "ok" in case else {"error": case["error"]}
        explain = partial(reasons.list_of_text, case["text"])
        yield same(case["text"], "parts", ours, golden, explain)


def _without_paths(text: str) -> str:
    return re.sub("<img>.*?</img>", "<img></img>", text)


CHECKS = {
    "tokenizer/encode_*.json": encode,
    "tokenizer/decode_*.json": decode,
    "tokenizer/special_tokens_*.json": special_tokens,
    "tokenizer/from_list_format.json": from_list_format,
    "tokenizer/to_list_format_*.json": to_list_format,
    "tokenizer/batch_*.json": batch,
}
