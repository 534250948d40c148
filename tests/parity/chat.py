"""Prompts, answers, stop words and training samples.

They are those of the published chat, its fine-tuning script and ms-swift.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from parity import reasons
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
from qwenvl_lit.generation.sampling import Stops
from qwenvl_lit.models.qwen_vl.image_processing import normalize_pixels
from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.types import Conversation, ImageSource, Turn


def make_context(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer = file.tokenizer
    for template in ("chatml", "raw"):
        processor = QwenVLProcessor(tokenizer, template=template)
        name = f"stop_words_ids_{template}"
        ours, golden = [[token_id] for token_id in processor.stop_ids], file.data[name]
        yield same(name, "stop ids", ours, golden, partial(reasons.stop_ids, template))
    for case in file.data["cases"]:
        if case["chat_format"] == "raw":  # the original reads the question alone
            talk = conversation(case["name"], [parts(case["query"])])
        else:
            texts = [*chain.from_iterable(case["history"]), case["query"]]
            contents = [text and parts(text) for text in texts]
            talk = conversation(case["name"], contents, case["system"])
        processor = QwenVLProcessor(
            tokenizer,
            image_size=14,
            template=case["chat_format"],
            max_window_size=case["max_window_size"],
        )
        ours = sample(processor, talk, prompt=True)
        golden = {"ids": spans_closed(case["ids"], tokenizer)}
        explain = partial(reasons.prompt, case, tokenizer)
        yield same(case["name"], "ids", ours, golden, explain)


def decode_tokens(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        processor = QwenVLProcessor(file.tokenizer, image_size=14, template=case["chat_format"])
        ours = processor.decode(case["generated_ids"], Conversation(id="", turns=())).text
        name = f"{case['raw_text']} + {case['generated_ids']}"
        explain = partial(reasons.answer_text, case, file.tokenizer)
        yield same(name, "text", ours, case["response"], explain)


def stop_words(path: Path) -> Iterator[Result]:
    """Compares where an answer ends.

    Where the original forces the end, a stop id has just been generated. The end itself needs no
    forcing.
    """
    file = opened(path)
    for case in file.data["cases"]:
        words = [word for word in case["stop_words_ids"] if word != [case["eos_token_id"]]]
        stops = Stops(1, (), torch.device("cpu"), words)
        ended = [stops.all_ended(torch.tensor([token_id])) for token_id in case["input_ids"]]
        ends_here = ended[-1] and not ended[-2]
        yield same(json.dumps(case["input_ids"]), "stops", ends_here, case["forces_eos"])


def turns_of(messages: Sequence[dict[str, str]]) -> tuple[Turn, ...]:
    return tuple(Turn(role=item["from"], parts=parts(item["value"])) for item in messages)


def train_finetune(path: Path) -> Iterator[Result]:
    file = opened(path)
    tokenizer = file.tokenizer
    for case in file.data["cases"]:
        encode = partial(finetune_sample, case, tokenizer)
        ours = encode(case["conversations"], max_length=case.get("max_len"))
        golden = golden_sample(case, tokenizer)
        explain = partial(reasons.finetune_sample, case, tokenizer, encode)
        yield same(case["name"], "ids and labels", ours, golden, explain)


def finetune_sample(
    case: dict[str, Any],
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    max_length: int | None = None,
) -> dict[str, Any]:
    """Returns our sample of some messages, padded as that of the case.

    The original pads every sample; here the collator pads a batch.
    """
    processor = QwenVLProcessor(
        tokenizer,
        image_size=14,
        system=case.get("system_message"),
        supervise="official",
        max_length=max_length,
    )
    ours = sample(processor, Conversation(id=case["name"], turns=turns_of(messages)))
    if "ids" in ours:
        padding = len(case.get("attention_mask", ())) - len(ours["ids"])
        ours["ids"] += [tokenizer.pad_id] * padding
        ours["labels"] += [None] * padding
    return ours


def train_swift(path: Path) -> Iterator[Result]:
    file = opened(path)
    for case in file.data["cases"]:
        truncates = case.get("truncation_strategy") == "truncation_left"
        processor = QwenVLProcessor(
            file.tokenizer,
            image_size=14,
            system=case.get("default_system"),
            max_length=case.get("max_length"),
            too_long="truncate_left" if truncates else "error",
        )
        ours = swift_sample(processor, case, {})
        golden = golden_sample(case, file.tokenizer)
        explain = partial(reasons.swift_sample, case, file.tokenizer)
        yield same(case["name"], "ids and labels", ours, golden, explain)


def train_differences(path: Path) -> Iterator[Result]:
    """Compares how our two supervision modes differ with how the script and ms-swift differ."""
    file = opened(path)
    recorded = read(path.with_name(path.name.replace("differences", "finetune")))["cases"]
    sources = {case["name"]: case for case in recorded}
    for case in file.data["cases"]:
        source = sources[case["name"]]
        talk = Conversation(id=case["name"], turns=turns_of(source["conversations"]))
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
            by_finetune = set((finetune.labels >= 0).nonzero().flatten().tolist())
            by_swift = set((swift.labels >= 0).nonzero().flatten().tolist())
            ours["positions_labelled_only_by_finetune"] = sorted(by_finetune - by_swift)
            ours["positions_labelled_only_by_swift"] = sorted(by_swift - by_finetune)
        golden = {key: value for key, value in case.items() if key != "name"}
        explain = partial(reasons.differences, source)
        yield same(case["name"], "ids and labels", ours, golden, explain)


def chat(path: Path) -> Iterator[Result]:
    """Compares `chat()` from end to end: prompt, greedy answer, its text, the history with it."""
    file = opened(path)
    tokenizer, suppressed = file.tokenizer, torch.tensor(file.data["suppress_tokens"])
    model = load(path.parent)
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, suppressed, -torch.inf)
    )
    image_size = read(path.with_name("config.json"))["visual"]["image_size"]
    for case in file.data["cases"]:
        extra = [words[0] for words in case["extra_stop_words_ids"] or ()]
        history = case["history"] or []
        texts = [*chain.from_iterable(history), case["query"]]
        contents = [parts(text, lambda name: ImageSource(path.parent / name)) for text in texts]
        talk = conversation("", contents)
        processor = QwenVLProcessor(
            tokenizer,
            tokens_per_image=model.config.n_queries,
            image_size=image_size,
            system=case["system"],
        )
        prompt = processor.encode(talk, prompt=True)
        batch = Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision, side="left")(
            [prompt]
        )
        stops = [*processor.stop_ids, *extra]
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if len(batch.vision_positions):
            inputs["pixel_values"] = normalize_pixels(batch.vision["pixel_values"])
            inputs["vision_positions"] = batch.vision_positions
        generate = Generation(max_new_tokens=case["max_new_tokens"])
        ids = generate(model, inputs, stop_ids=stops, pad_id=processor.pad_id)[0]

        name = f"{case['query']} (stops at {extra})" if extra else case["query"]
        closed = spans_closed(prompt.input_ids.tolist(), tokenizer)
        yield same(name, "prompt ids", closed, spans_closed(case["prompt_ids"], tokenizer))
        expected = before_stop(case["generated_ids"], stops)
        yield same(name, "generated ids", ids, expected)
        # The original removes the last id, whether it is an end-of-turn token or not.
        text = tokenizer.decode(case["generated_ids"][:-1])
        yield same(name, "text of the ids", text, case["response"])
        answered = [*history, [case["query"], processor.decode(ids, talk).text]]
        explain = None
        if ids == expected:
            explain = partial(reasons.shown_history, [*history, [case["query"], text]])
        shown, golden = f"{name}, as shown", case["returned_history"]
        yield same(shown, "history with the answer", answered, golden, explain)


CHECKS = {
    "model/chat.json": chat,
    "chat/make_context_*.json": make_context,
    "chat/decode_tokens_*.json": decode_tokens,
    "chat/stop_words_*.json": stop_words,
    "chat/train_finetune_*.json": train_finetune,
    "chat/train_swift_*.json": train_swift,
    "chat/train_differences_*.json": train_differences,
}
