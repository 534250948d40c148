"""Compare tokens, prompts, labels and boxes with recorded values of the original programs.

    python scripts/check_golden_text.py tests/golden

The folder has `tokenizer/`, `chat/` and `grounding/`, and may have `deviations.json`: what differs on purpose, what we give there, and why.
Files ending in `_synthetic.json` use `tokenizer/synthetic.tiktoken`; those ending in `_qwen.json` the published vocabulary, which the PyPI
package `dashscope` ships, and are left out without it. Pictures are read as places of a size: what is in them changes no token.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.families.qwen_vl import QwenVLProcessor
from qwenvl_lit.grounding import object_in_frame, objects_from_tags, tags_from_object, to_frame
from qwenvl_lit.models.tokenizer import TINY_VOCABULARY, QwenTokenizer
from qwenvl_lit.types import Box, Conversation, DataError, GroundedObject, Part, Picture, Sample, Turn

FRAMES = {"real": "pixel", "norm_1000": "grid", "norm_1": "unit"}
REFUSED = {"refused": True}


class Case(NamedTuple):
    """One recorded value and ours."""

    name: str
    ours: Any
    golden: Any


class File(NamedTuple):
    """A recorded file and the vocabulary it belongs to."""

    data: dict[str, Any]
    tokenizer: QwenTokenizer


# -- tokenizer --------------------------------------------------------------------------------------------------------------------


def encode(file: File) -> Iterator[Case]:
    tokenizer = file.tokenizer
    image_tags = [name for name, id in tokenizer.special.items() if id in tokenizer.tag_ids] + ["<img>", "</img>"]
    decoded = {
        "decoded": {},
        "decoded_skip_special": {"skip_special": True},
        "decoded_skip_special_keep_image_special": {"skip_special": True, "keep": tokenizer.tag_ids},
    }
    for case in file.data["cases"]:
        golden, ours, text = {}, {}, case["text"]
        for key, allowed in {"ids": tokenizer.special, "ids_image_tags_only": image_tags}.items():
            if key in case:
                golden[key] = case[key] if isinstance(case[key], dict) else _paths_read(case[key], tokenizer, in_bytes=True)
                ours[key] = _paths_read(tokenizer.encode(text, allowed_special=allowed), tokenizer, in_bytes=False)
        last = text
        for key, options in decoded.items():
            if "decoded" in case:
                last = case.get(key, last) if case.get(key) is not True else text
                golden[key], ours[key] = last, tokenizer.decode(case["ids"], **options)
                ours["streamed"] = "".join(tokenizer.stream(case["ids"]))
                golden["streamed"] = golden["decoded"]
        yield Case(text, ours, golden)


def _paths_read(ids: Sequence[int], tokenizer: QwenTokenizer, *, in_bytes: bool) -> list[int | str]:
    """`ids` with the text of each picture's span in place of its ids; `in_bytes`: as the original writes a path there."""
    out: list[int | str] = []
    rest = list(ids)
    while rest:
        out.append(rest.pop(0))
        if out[-1] == tokenizer.img_start_id and tokenizer.img_end_id in rest:
            end = rest.index(tokenizer.img_end_id)
            span = [id for id in rest[:end] if id != tokenizer.img_pad_id]
            out[-1] = f"<img>{bytes(span).decode() if in_bytes else tokenizer.decode(span)}</img>"
            rest = rest[end + 1 :]
    return out


def decode(file: File) -> Iterator[Case]:
    tokenizer = file.tokenizer
    options = {
        "replace": {},
        "ignore": {"errors": "ignore"},
        "skip_special": {"skip_special": True},
        "keep_image_special": {"skip_special": True, "keep": tokenizer.tag_ids},
    }
    for case in file.data["cases"]:
        ours = {key: tokenizer.decode(case["ids"], **option) for key, option in options.items()}
        yield Case(json.dumps(case["ids"]), ours, {key: case[key] for key in options})


def special_tokens(file: File) -> Iterator[Case]:
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
        "image_token_span": QwenVLProcessor(tokenizer).span,
        "special_tokens": tokenizer.special,
    }
    yield from (Case(key, value, data[key]) for key, value in ours.items())


def batch(file: File) -> Iterator[Case]:
    tokenizer, nobody = file.tokenizer, Conversation(id="", turns=())
    none = torch.empty(0, dtype=torch.int64)
    for case in file.data["cases"]:
        rows = [torch.tensor(tokenizer.encode(text, allowed_special=tokenizer.special)) for text in case["texts"]]
        samples = [Sample(conversation=nobody, input_ids=ids, labels=ids, vision_positions=none, vision={}) for ids in rows]
        padded = Pad(pad_id=tokenizer.pad_id, side=case["padding_side"])(samples)
        ours = {"input_ids": padded.input_ids.tolist(), "attention_mask": padded.attention_mask.tolist()}
        yield Case(json.dumps(case["texts"]), ours, {key: case[key] for key in ours})


# -- conversations as parts -------------------------------------------------------------------------------------------------------


def picture(path: str, sizes: dict[str, list[int]] | None = None) -> Picture:
    width, height = (sizes or {}).get(path, (14, 14))
    return Picture(Image.new("RGB", (width, height)))


def parts(text: str) -> tuple[Part, ...]:
    """Text with `<img>path</img>` and box markup, parted."""
    pieces = enumerate(re.split("<img>(.*?)</img>", text))
    return tuple(part for place, piece in pieces for part in ([picture(piece)] if place % 2 else objects_from_tags(piece)))


def conversation(name: str, contents: Sequence[Sequence[Part] | None], system: str | None = None) -> Conversation:
    """A question, an answer, a question, ...; None is left out."""
    first = [] if system is None else [Turn(role="system", parts=parts(system))]
    turns = [
        Turn(role=("user", "assistant")[place % 2], parts=tuple(content)) for place, content in enumerate(contents) if content is not None
    ]
    return Conversation(id=name, turns=(*first, *turns))


def written(content: Sequence[Part]) -> str:
    """Parts as the text that the processor writes, before it is tokenised."""
    tokenizer = QwenTokenizer(TINY_VOCABULARY)
    turn = Turn(role="assistant", parts=tuple(content))
    return QwenVLProcessor(tokenizer, side=14).decode([], Conversation(id="", turns=(turn,))).reference or ""


def from_list_format(file: File) -> Iterator[Case]:
    for case in file.data["cases"]:
        content: list[Part] = []
        for item in case["arg"]:
            if "image" in item:
                content.append(picture(item["image"]))
            elif "text" in item:
                content.append(item["text"])
            else:
                boxes = tuple(Box(x0=x0, y0=y0, x1=x1, y1=y1, frame="grid") for x0, y0, x1, y1 in item.get("box", ()))
                content.append(GroundedObject(label=item.get("ref"), boxes=boxes))
        golden = _without_paths(case["ok"]) if "ok" in case else {"error": case["error"]}
        yield Case(json.dumps(case["arg"], ensure_ascii=False), written(content), golden)


def to_list_format(file: File) -> Iterator[Case]:
    for case in file.data["cases"]:
        ours: list[dict[str, str]] = []
        for part in parts(unicodedata.normalize("NFC", case["text"])):
            if isinstance(part, str):
                ours.append({"text": part})
            elif isinstance(part, Picture):
                ours.append({"image": ""})
            else:
                ours += [{"ref": part.label}] if part.label is not None else []
                for box in part.boxes:
                    tag, text, _ = tags_from_object(GroundedObject(boxes=(box,)), ())
                    ours.append({tag.value.strip("<>"): text})
        golden = [{key: "" if key == "image" else value for key, value in item.items()} for item in case.get("ok", ())]
        yield Case(case["text"], ours, golden if "ok" in case else {"error": case["error"]})


def _without_paths(text: str) -> str:
    return re.sub("<img>.*?</img>", "<img></img>", text)


# -- chat -------------------------------------------------------------------------------------------------------------------------


def sample(processor: QwenVLProcessor, talk: Conversation, *, prompt: bool = False) -> dict[str, Any]:
    """Our ids and labels, each picture's span as one entry."""
    try:
        encoded = processor.encode(talk, prompt=prompt)
    except DataError:
        return REFUSED
    found = {"ids": _spans_closed(encoded.input_ids.tolist(), processor.tokenizer)}
    if not prompt:
        found["labels"] = _labels_closed(encoded.input_ids.tolist(), encoded.labels.tolist(), processor.tokenizer)
    return found


def golden_sample(case: dict[str, Any], tokenizer: QwenTokenizer) -> dict[str, Any]:
    """The recorded ids and labels in the same form."""
    if case.get("input_ids") is None:
        return REFUSED
    found = {"ids": _spans_closed(case["input_ids"], tokenizer)}
    if case["labels"] is not None:
        found["labels"] = _labels_closed(case["input_ids"], case["labels"], tokenizer)
    return found


def _spans_closed(ids: Sequence[int], tokenizer: QwenTokenizer) -> list[int | str]:
    return ["picture" if isinstance(item, str) else item for item in _paths_read(ids, tokenizer, in_bytes=True)]


def _labels_closed(ids: Sequence[int], labels: Sequence[int], tokenizer: QwenTokenizer) -> list[int | str | None]:
    """Labels with None where nothing is learned; one entry, "picture" or None, for a span."""
    out: list[int | str | None] = []
    inside = False
    for id, label in zip(ids, labels, strict=True):
        if not inside:
            out.append(None if label < 0 else "picture" if id == tokenizer.img_start_id else label)
        inside = id == tokenizer.img_start_id or (inside and id != tokenizer.img_end_id)
    return out


def make_context(file: File) -> Iterator[Case]:
    tokenizer = file.tokenizer
    for template in ("chatml", "raw"):
        stops = [[id] for id in QwenVLProcessor(tokenizer, template=template).stop_ids]
        yield Case(f"stop_words_ids_{template}", stops, file.data[f"stop_words_ids_{template}"])
    for case in file.data["cases"]:
        if case["chat_format"] == "raw":  # the original reads the question alone
            talk = conversation(case["name"], [parts(case["query"])])
        else:
            contents = [None if text is None else parts(text) for text in [*chain.from_iterable(case["history"]), case["query"]]]
            talk = conversation(case["name"], contents, case["system"])
        processor = QwenVLProcessor(tokenizer, side=14, template=case["chat_format"], window=case["max_window_size"])
        ours = sample(processor, talk, prompt=True)
        yield Case(case["name"], ours, {"ids": _spans_closed(case["ids"], tokenizer)})


def decode_tokens(file: File) -> Iterator[Case]:
    for case in file.data["cases"]:
        processor = QwenVLProcessor(file.tokenizer, side=14, template=case["chat_format"])
        ours = processor.decode(case["generated_ids"], Conversation(id="", turns=())).text
        yield Case(f"{case['raw_text']} + {case['generated_ids']}", ours, case["response"])


def stop_words(file: File) -> Iterator[Case]:
    """Where the original forces the end, a stop id has just been generated; the end itself needs no forcing."""
    stops = set(QwenVLProcessor(file.tokenizer).stop_ids) - {file.data["cases"][0]["eos_token_id"]}
    for case in file.data["cases"]:
        yield Case(json.dumps(case["input_ids"]), case["input_ids"][-1] in stops, case["forces_eos"])


def train_finetune(file: File) -> Iterator[Case]:
    for case in file.data["cases"]:
        turns = [Turn(role=message["from"], parts=parts(message["value"])) for message in case["conversations"]]
        talk = Conversation(id=case["name"], turns=tuple(turns))
        options = {"system": case.get("system_message"), "max_length": case.get("max_len"), "supervise": "official"}
        ours = sample(QwenVLProcessor(file.tokenizer, side=14, **options), talk)
        if "ids" in ours:  # the original pads every sample; here the collator does, for a batch
            padding = len(case.get("attention_mask", ())) - len(ours["ids"])
            ours["ids"] += [file.tokenizer.pad_id] * padding
            ours["labels"] += [None] * padding
        yield Case(case["name"], ours, golden_sample(case, file.tokenizer))


def train_swift(file: File) -> Iterator[Case]:
    for case in file.data["cases"]:
        too_long = "truncate_left" if case.get("truncation_strategy") == "truncation_left" else "error"
        options = {"system": case.get("default_system"), "max_length": case.get("max_length"), "too_long": too_long}
        processor = QwenVLProcessor(file.tokenizer, side=14, **options)
        yield Case(case["name"], _swift_sample(processor, case, {}), golden_sample(case, file.tokenizer))


def _swift_sample(processor: QwenVLProcessor, case: dict[str, Any], sizes: dict[str, list[int]]) -> dict[str, Any]:
    """Our sample of a row in ms-swift's form; one that cannot be read is refused."""
    row = case["example"]
    texts = [*chain.from_iterable(row.get("history") or ()), row["query"], *([row["response"]] if "response" in row else [])]
    images = [row["images"]] if isinstance(row.get("images"), str) else row.get("images", [])
    texts[0] = "<image>" * (len(images) - "".join(texts).count("<image>")) + texts[0]
    objects = row.get("objects", [])
    if isinstance(objects, str):
        pairs = {"bbox_type": "norm_1000", "image": 0}
        objects = [item if isinstance(item, dict) else {"caption": item[0], "bbox": item[1], **pairs} for item in json.loads(objects)]
    left = {"<image>": list(images), "<ref-object>": list(objects), "<bbox>": list(objects)}

    def parted(text: str) -> Iterator[Part]:
        for piece in re.split("(<image>|<img>.*?</img>|<ref-object>|<bbox>)", text):
            if piece == "<image>":
                yield picture(left[piece].pop(0), sizes)
            elif piece.startswith("<img>"):
                yield picture(piece)
            elif piece == "<ref-object>":
                yield GroundedObject(label=left[piece].pop(0)["caption"])
            elif piece == "<bbox>":
                item = left[piece].pop(0)
                values = item["bbox"] if isinstance(item["bbox"][0], list) else [item["bbox"]]
                boxes = [Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=FRAMES[item["bbox_type"]]) for x0, y0, x1, y1 in values]
                yield GroundedObject(boxes=tuple(boxes), picture=item["image"])
            else:
                yield from objects_from_tags(piece)

    try:
        talk = conversation(case["name"], [list(parted(text)) for text in texts], row.get("system"))
    except (IndexError, TypeError):  # more tags than things, or pairs outside of JSON
        return REFUSED
    return sample(processor, talk, prompt="response" not in row)


# -- grounding --------------------------------------------------------------------------------------------------------------------


def normalize_bbox(file: File) -> Iterator[Case]:
    for case in file.data["cases"]:
        x0, y0, x1, y1 = case["bbox"]
        box = Box(x0=x0, y0=y0, x1=x1, y1=y1, frame=FRAMES[case["bbox_type"]])
        moved = to_frame(box, FRAMES[case["to_type"]], size=tuple(case["size"]))
        ours = [moved.x0, moved.y0, moved.x1, moved.y1]
        if case["to_type"] == "real" != case["bbox_type"]:
            ours = [int(value) for value in ours]  # ms-swift cuts pixels too; we keep the fraction, for the IoU
        yield Case(json.dumps([case["size"], case["bbox"], case["bbox_type"], case["to_type"]]), ours, case["result"])


def response_boxes(file: File) -> Iterator[Case]:
    sizes = file.data["image_sizes"]
    for case in file.data["cases"]:
        found: list[dict[str, Any]] = []
        pixels: list[list[float]] = []
        pictures = [picture(path, sizes) for text in chain.from_iterable(case["history"]) for path in re.findall("<img>(.*?)</img>", text)]
        for part in objects_from_tags(case["response"], picture=len(pictures) - 1):
            boxes = [box for box in part.boxes if isinstance(box, Box)] if isinstance(part, GroundedObject) else []
            found += [{"box": [box.x0, box.y0, box.x1, box.y1]} for box in boxes]
            if boxes and part.label is not None:
                found[-len(boxes)]["ref"] = part.label.strip()
            if boxes and pictures:
                pixels += [[box.x0, box.y0, box.x1, box.y1] for box in object_in_frame(part, "pixel", pictures).boxes]
        drawn = [item[1] for item in case["drawn"] or () if item[0] == "box"]
        pairs = zip(chain.from_iterable(pixels), chain.from_iterable(drawn or pixels), strict=True)
        near = all(abs(a - b) < 2 for a, b in pairs)  # drawn at x / 1000 and cut to whole pixels; ours are x / 999
        name = f"{case['response']} after {case['history']}"
        yield Case(name, {"boxes": found, "near": near}, {"boxes": case["boxes"], "near": True})


def swift_objects(file: File) -> Iterator[Case]:
    processor = QwenVLProcessor(file.tokenizer, side=14)
    for case in file.data["cases"]:
        ours = _swift_sample(processor, case, file.data["image_sizes"])
        yield Case(f"{case['name']} ({case['objects_form']})", ours, golden_sample(case, file.tokenizer))


# -- all of a folder --------------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[File], Iterator[Case]]] = {
    "tokenizer/encode": encode,
    "tokenizer/decode": decode,
    "tokenizer/special_tokens": special_tokens,
    "tokenizer/from_list_format": from_list_format,
    "tokenizer/to_list_format": to_list_format,
    "tokenizer/batch": batch,
    "chat/make_context": make_context,
    "chat/decode_tokens": decode_tokens,
    "chat/stop_words": stop_words,
    "chat/train_finetune": train_finetune,
    "chat/train_swift": train_swift,
    "grounding/normalize_bbox": normalize_bbox,
    "grounding/response_boxes": response_boxes,
    "grounding/swift_objects": swift_objects,
}


def cases(folder: Path) -> Iterator[tuple[str, Case]]:
    """Every case of every file of the folder that can be compared here, with the file's name."""
    synthetic = QwenTokenizer(folder / "tokenizer" / "synthetic.tiktoken")
    package = find_spec("dashscope")
    published = QwenTokenizer(Path(package.origin).parent / "resources" / "qwen.tiktoken") if package and package.origin else None
    for kind, compare in KINDS.items():
        for path in sorted(folder.glob(f"{kind}*.json")):
            data = json.loads(path.read_text())
            tokenizer = published if data.get("vocab") == "qwen.tiktoken" else synthetic
            if tokenizer is not None:
                for case in compare(File(data, tokenizer)):
                    yield path.relative_to(folder).as_posix(), case


def main(folder: Path) -> int:
    """Print how many cases agree and what differs; the number of surprises."""
    recorded = folder / "deviations.json"
    deviations = json.loads(recorded.read_text()) if recorded.exists() else {}
    equal = expected = surprises = 0
    for file, case in cases(folder):
        if case.ours == case.golden:
            equal += 1
        elif deviations.get(file, {}).get(case.name, {}).get("ours") == case.ours:
            expected += 1
        else:
            surprises += 1
            print(f"{file}: {case.name}\n  ours   {case.ours}\n  golden {case.golden}")
    print(f"{equal} equal, {expected} different on purpose, {surprises} different")
    return surprises


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.exit(bool(main(parser.parse_args().folder)))
