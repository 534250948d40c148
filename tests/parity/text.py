"""Text to ids and back, padding, and images and boxes as lists."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from parity.conversations import blank, opened, parts, paths_read
from parity.result import Result, same
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.grounding import tags_from_object
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY, QwenTokenizer
from qwenvl_lit.types import Box, Conversation, GroundedObject, ImageSource, Part, Sample, Turn


def encode(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer = file.tokenizer
    image_tags = [name for name, id in tokenizer.special.items() if id in tokenizer.tag_ids] + [
        "<img>",
        "</img>",
    ]
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
        for key, allowed in {"ids": tokenizer.special, "ids_image_tags_only": image_tags}.items():
            if key in case:
                golden[key] = (
                    case[key]
                    if isinstance(case[key], dict)
                    else paths_read(case[key], tokenizer, in_bytes=True)
                )
                ours[key] = paths_read(
                    tokenizer.encode(text, allowed_special=allowed), tokenizer, in_bytes=False
                )
        last = text
        for key, options in decoded.items():
            if "decoded" in case:
                last = case.get(key, last) if case.get(key) is not True else text
                golden[key], ours[key] = last, tokenizer.decode(case["ids"], **options)
                ours["streamed"] = "".join(tokenizer.stream(case["ids"]))
                golden["streamed"] = golden["decoded"]
        yield same(text, "ids and text", ours, golden)


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
        yield same(json.dumps(case["ids"]), "text", ours, {key: case[key] for key in options})


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
        padded = Pad(pad_id=tokenizer.pad_id, side=case["padding_side"])(samples)
        ours = {
            "input_ids": padded.input_ids.tolist(),
            "attention_mask": padded.attention_mask.tolist(),
        }
        yield same(
            json.dumps(case["texts"]) + case["padding_side"],
            "ids and mask",
            ours,
            {key: case[key] for key in ours},
        )


def written(content: Sequence[Part]) -> str:
    """Parts as the text that the processor writes, before it is tokenised."""
    tokenizer = QwenTokenizer(TINY_VOCABULARY)
    turn = Turn(role="assistant", parts=tuple(content))
    return (
        QwenVLProcessor(tokenizer, image_size=14).decode([], Conversation(id="", turns=(turn,))).reference
        or ""
    )


def from_list_format(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        content: list[Part] = []
        for item in case["arg"]:
            if "image" in item:
                content.append(blank(item["image"]))
            elif "text" in item:
                content.append(item["text"])
            else:
                boxes = tuple(
                    Box(x0=x0, y0=y0, x1=x1, y1=y1, frame="grid")
                    for x0, y0, x1, y1 in item.get("box", ())
                )
                content.append(GroundedObject(label=item.get("ref"), boxes=boxes))
        golden = _without_paths(case["ok"]) if "ok" in case else {"error": case["error"]}
        yield same(json.dumps(case["arg"], ensure_ascii=False), "text", written(content), golden)


def to_list_format(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        ours: list[dict[str, str]] = []
        for part in parts(
            unicodedata.normalize("NFC", case["text"]), lambda name: ImageSource(Path(name))
        ):
            if isinstance(part, str):
                ours.append({"text": part})
            elif isinstance(part, ImageSource):
                ours.append({"image": str(part.source) if part.source.parts else ""})
            else:
                ours += [{"ref": part.label}] if part.label is not None else []
                for box in part.boxes:
                    tag, text, _ = tags_from_object(GroundedObject(boxes=(box,)), ())
                    ours.append({tag.value.strip("<>"): text})
        yield same(
            case["text"], "parts", ours, case["ok"] if "ok" in case else {"error": case["error"]}
        )


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
