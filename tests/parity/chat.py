"""Prompts, answers, stop words and training samples of the published chat, its fine-tuning script and ms-swift."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from parity.conversations import (
    conversation,
    golden_sample,
    opened,
    parts,
    sample,
    spans_closed,
    swift_sample,
)
from parity.network import before_stop, load
from parity.result import Result, read, same
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.image_processing import normalized
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.types import Conversation, ImageSource, Turn


def make_context(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer = file.tokenizer
    for template in ("chatml", "raw"):
        stops = [[id] for id in QwenVLProcessor(tokenizer, template=template).stop_ids]
        yield same(
            f"stop_words_ids_{template}", "stop ids", stops, file.data[f"stop_words_ids_{template}"]
        )
    for case in file.data["cases"]:
        if case["chat_format"] == "raw":  # the original reads the question alone
            talk = conversation(case["name"], [parts(case["query"])])
        else:
            contents = [
                None if text is None else parts(text)
                for text in [*chain.from_iterable(case["history"]), case["query"]]
            ]
            talk = conversation(case["name"], contents, case["system"])
        processor = QwenVLProcessor(
            tokenizer, image_size=14, template=case["chat_format"], max_window_size=case["max_window_size"]
        )
        ours = sample(processor, talk, prompt=True)
        yield same(case["name"], "ids", ours, {"ids": spans_closed(case["ids"], tokenizer)})


def decode_tokens(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        processor = QwenVLProcessor(file.tokenizer, image_size=14, template=case["chat_format"])
        ours = processor.decode(case["generated_ids"], Conversation(id="", turns=())).text
        yield same(f"{case['raw_text']} + {case['generated_ids']}", "text", ours, case["response"])


def stop_words(path: Path) -> Iterator[Result]:
    """Where the original forces the end, a stop id has just been generated; the end itself needs no forcing."""
    file = opened(path)
    stops = set(QwenVLProcessor(file.tokenizer).stop_ids) - {file.data["cases"][0]["eos_token_id"]}
    for case in file.data["cases"]:
        yield same(
            json.dumps(case["input_ids"]),
            "stops",
            case["input_ids"][-1] in stops,
            case["forces_eos"],
        )


def train_finetune(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        turns = [
            Turn(role=message["from"], parts=parts(message["value"]))
            for message in case["conversations"]
        ]
        talk = Conversation(id=case["name"], turns=tuple(turns))
        options = {
            "system": case.get("system_message"),
            "max_length": case.get("max_len"),
            "supervise": "official",
        }
        ours = sample(QwenVLProcessor(file.tokenizer, image_size=14, **options), talk)
        if "ids" in ours:  # the original pads every sample; here the collator does, for a batch
            padding = len(case.get("attention_mask", ())) - len(ours["ids"])
            ours["ids"] += [file.tokenizer.pad_id] * padding
            ours["labels"] += [None] * padding
        yield same(case["name"], "ids and labels", ours, golden_sample(case, file.tokenizer))


def train_swift(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        too_long = (
            "truncate_left" if case.get("truncation_strategy") == "truncation_left" else "error"
        )
        options = {
            "system": case.get("default_system"),
            "max_length": case.get("max_length"),
            "too_long": too_long,
        }
        processor = QwenVLProcessor(file.tokenizer, image_size=14, **options)
        yield same(
            case["name"],
            "ids and labels",
            swift_sample(processor, case, {}),
            golden_sample(case, file.tokenizer),
        )


def train_differences(path: Path) -> Iterator[Result]:
    """Our two supervision modes differ as the fine-tuning script and ms-swift do."""
    file = opened(path)
    recorded = read(path.with_name(path.name.replace("differences", "finetune")))["cases"]
    conversations = {case["name"]: case for case in recorded}
    for case in file.data["cases"]:
        source = conversations[case["name"]]
        turns = [
            Turn(role=message["from"], parts=parts(message["value"]))
            for message in source["conversations"]
        ]
        talk = Conversation(id=case["name"], turns=tuple(turns))
        options = {"image_size": 14, "system": source.get("system_message")}
        finetune = QwenVLProcessor(file.tokenizer, supervise="official", **options).encode(talk)
        swift = QwenVLProcessor(file.tokenizer, supervise="answers", **options).encode(talk)
        same_ids = finetune.input_ids[:-1].equal(swift.input_ids)
        ours = {
            "n_finetune": len(finetune.input_ids),
            "n_swift": len(swift.input_ids),
            "swift_ids_are_finetune_ids_without_last_newline": same_ids,
        }
        if same_ids:
            learned = [
                {place for place, label in enumerate(sample.labels.tolist()) if label >= 0}
                for sample in (finetune, swift)
            ]
            ours["positions_labelled_only_by_finetune"] = sorted(learned[0] - learned[1])
            ours["positions_labelled_only_by_swift"] = sorted(learned[1] - learned[0])
        yield same(
            case["name"],
            "ids and labels",
            ours,
            {key: value for key, value in case.items() if key != "name"},
        )


def chat(path: Path) -> Iterator[Result]:
    """`chat()` from end to end: prompt, greedy answer, its text, the history with it."""
    file = opened(path)
    suppressed = file.data["suppress_tokens"]
    model = load(path.parent)
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor(suppressed), -torch.inf)
    )
    config = read(path.with_name("config.json"))
    span, side = model.config.n_queries, config["visual"]["image_size"]
    for case in file.data["cases"]:
        extra = [words[0] for words in case["extra_stop_words_ids"] or ()]
        history = case["history"] or []
        texts = [*chain.from_iterable(history), case["query"]]
        talk = conversation(
            "", [parts(text, lambda name: ImageSource(path.parent / name)) for text in texts]
        )
        processor = QwenVLProcessor(file.tokenizer, tokens_per_image=span, image_size=side, system=case["system"])
        prompt = processor.encode(talk, prompt=True)
        batch = Pad(pad_id=processor.pad_id, side="left")([prompt])
        stops = [*processor.stop_ids, *extra]
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if len(batch.vision_positions):
            inputs |= {
                "pixel_values": normalized(batch.vision["pixel_values"]),
                "vision_positions": batch.vision_positions,
            }
        generate = Generation(max_new_tokens=case["max_new_tokens"])
        ids = generate(model, inputs, stop_ids=stops, pad_id=processor.pad_id)[0]

        name = f"{case['query']} (stops at {extra})" if extra else case["query"]
        closed = spans_closed(prompt.input_ids.tolist(), file.tokenizer)
        yield same(name, "prompt ids", closed, spans_closed(case["prompt_ids"], file.tokenizer))
        yield same(name, "generated ids", ids, before_stop(case["generated_ids"], stops))
        cut = file.tokenizer.decode(
            case["generated_ids"][:-1]
        )  # the original's rule: an end mark or not, the last one goes
        yield same(name, "text of the ids", cut, case["response"])
        answered = [*history, [case["query"], processor.decode(ids, talk).text]]
        yield same(
            f"{name}, as shown", "history with the answer", answered, case["returned_history"]
        )


CHECKS = {
    "model/chat.json": chat,
    "chat/make_context_*.json": make_context,
    "chat/decode_tokens_*.json": decode_tokens,
    "chat/stop_words_*.json": stop_words,
    "chat/train_finetune_*.json": train_finetune,
    "chat/train_swift_*.json": train_swift,
    "chat/train_differences_*.json": train_differences,
}
