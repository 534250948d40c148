"""The reasons for which results differ on purpose, and rules that recognize such cases.

A rule gets the input of a case, our result and the recorded one, which differ. It returns the
reason, or None if it cannot explain the difference. Wherever possible it derives one result from
the other, so that no other difference is hidden by a reason.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from qwenvl_lit.models.qwen_vl.tokenizer import SPECIALS, QwenTokenizer

REFUSED = {"refused": True}

FULL_SPAN = (
    "The original fails on a path that fills its span completely, because no padding follows. "
    "This package decodes the ids as tokens."
)
NO_PATHS = (
    "Image paths are not encoded as tokens. They may have any length, and <img> and </img> are "
    "ordinary special tokens."
)
NO_PADDING = (
    "The original raises an error if a span contains no <imgpad>. This package decodes the ids "
    "between the tags as tokens."
)
NOT_CUT = (
    "Values on the grid are written unchanged, as in ms-swift. The original's `from_list_format` "
    "truncates them."
)
LABEL_ALONE = "A label without a box can be written."
STAYS_TEXT = (
    "Invalid markup stays text, and so does markup that is typed as plain characters. Parsing "
    "never raises an error."
)
END_OF_TEXT_STOPS = (
    "In chat, <|endoftext|> also ends an answer, because the published generation settings list it."
)
RAW_STOPS = (
    'In the raw template only <|endoftext|> ends an answer. The original also stops at "Human:".'
)
ONE_NEWLINE = (
    "After a question without an answer, the original writes two newlines. This package writes one."
)
NO_FORGERY = (
    "User text never becomes special tokens. So no file or question can forge a role or an "
    "end-of-turn token (QwenLM/Qwen issues 8 and 59)."
)
LAST_TOKEN = "Without a stop id, the original drops the last token. This package keeps it."
NORMALIZED_PROMPT = (
    "The original locates the answer by the prompt's length before Unicode normalization. If "
    "normalization shortens the prompt, the start of the answer is lost."
)
FIRST_STOP = "An answer ends before the first stop id, also in the raw template."
ONLY_BOXES = "Chat markup is removed from the text of an answer. Only box markup stays."
CUT_RIGHT = (
    "If a sample exceeds max_length, the original cuts off the end of the answer. This package "
    "refuses the sample, or truncates it on the left (`too_long=truncate_left`)."
)
FIRST_ANSWER = (
    "If a conversation begins with the assistant, the original drops that message. Here it is "
    "written and supervised."
)
OWN_SYSTEM = "A row may have its own system message."
EMPTY_SYSTEM = (
    "An empty system message is written to the prompt in training too. ms-swift omits it."
)
APART = (
    "Role, newline and text are tokenized separately, as in the model's own scripts. Tokenized "
    "together, two newlines would become one token."
)
NAMED_ONCE = 'An existing "Picture 1: " is not written again.'
ONLY_THE_SPAN = "If an answer contains an image, only the image tokens are unsupervised."
SEVERAL_BOXES = "All boxes of an object are converted, from any frame."
EMPTY_BOXES = "The IoU of two empty boxes is 0. The original divides 0 by 0."
NO_MEMORY = (
    "A long text leaves no state in the model. In the original, it changes later training steps."
)
SHOWN_TEXT = (
    "The displayed text keeps the last token if no stop id was generated. It ends before a stop "
    "word. It contains no special tokens except box markup. The token ids are equal."
)

SPELLED = re.compile("|".join(map(re.escape, SPECIALS)))
PREFIX_TWICE = re.compile(r"(Picture\s*\d+\s*[:：]\s*)Picture \d+: (picture of \d+ tokens)\n")
EMPTY_MESSAGE = "<|im_start|>system\n<|im_end|>\n"


def is_error(value: Any) -> bool:
    """Whether a recorded value says that the original raises."""
    return isinstance(value, dict) and "error" in value


def text_of(ids: Iterable[int | str | None], tokenizer: QwenTokenizer) -> str:
    """Decodes ids, among which strings stand for the spans of images.

    Special tokens appear by name; padding at the end is removed.
    """
    text = ""
    for is_text, group in groupby(ids, key=lambda item: isinstance(item, str)):
        items = list(group)
        text += "".join(items) if is_text else tokenizer.decode(items)
    return re.sub(r"(<\|endoftext\|>)+$", "", text)  # padding


def supervised_text(sample: dict[str, Any], tokenizer: QwenTokenizer) -> str:
    labels = [label for label in sample.get("labels", ()) if label is not None]
    return text_of(labels, tokenizer)


# -- tokenizer ------------------------------------------------------------------------------------


def encode(text: str, ours: dict[str, Any], golden: dict[str, Any]) -> str | None:
    differing = [key for key in golden if ours[key] != golden[key]]
    if "<img>" not in text or not all(is_error(golden[key]) for key in differing):
        return None
    return NO_PATHS if any(key.startswith("ids") for key in differing) else FULL_SPAN


def decode(
    ids: Sequence[int], tokenizer: QwenTokenizer, ours: dict[str, Any], golden: dict[str, Any]
) -> str | None:
    """Recognizes an image's span that holds no path followed by padding."""
    if not all(map(is_error, golden.values())) or tokenizer.img_start_id not in ids:
        return None
    for start, token_id in enumerate(ids):
        if token_id == tokenizer.img_start_id:
            span = list(ids[start + 1 :])
            if tokenizer.img_end_id not in span:
                return NO_PADDING
            span = span[: span.index(tokenizer.img_end_id)]
            if tokenizer.img_pad_id not in span:
                return NO_PADDING
            path = span[: span.index(tokenizer.img_pad_id)]
            if not all(0 <= value < 256 for value in path):
                return NO_PADDING
    return None


def list_of_text(text: str, ours: list[dict[str, str]], golden: Any) -> str | None:
    joined = _joined(ours)
    if is_error(golden):
        unchanged = joined == unicodedata.normalize("NFC", text)
        return STAYS_TEXT if SPELLED.search(text) and unchanged else None
    return STAYS_TEXT if joined == _joined(golden) else None


def _joined(items: list[dict[str, str]]) -> str:
    text = ""
    for item in items:
        [(kind, content)] = item.items()
        tag = {"image": "img"}.get(kind, kind)
        text += content if kind == "text" else f"<{tag}>{content}</{tag}>"
    return text


def text_of_list(
    items: list[dict[str, Any]],
    written: Callable[[list[dict[str, Any]]], Any],
    ours: Any,
    golden: Any,
) -> str | None:
    """Recognizes labels alone, and truncated coordinates.

    Args:
        written: returns our text of such a list.
    """
    if is_error(golden):
        return LABEL_ALONE if any(set(item) == {"ref"} for item in items) else None
    truncated = []
    for item in items:
        boxes = [list(map(int, box)) for box in item.get("box", ())]
        truncated.append({**item, "box": boxes} if boxes else item)
    return NOT_CUT if truncated != items and written(truncated) == golden else None


def boxes_of_answer(ours: list[dict[str, Any]], golden: Any) -> str | None:
    return STAYS_TEXT if is_error(golden) else None


# -- chat -----------------------------------------------------------------------------------------


def stop_ids(template: str, ours: list[list[int]], golden: list[list[int]]) -> str | None:
    if template == "chatml":
        return END_OF_TEXT_STOPS if ours[:-1] == golden else None
    return RAW_STOPS if ours == golden[-1:] else None


def prompt(
    case: dict[str, Any], tokenizer: QwenTokenizer, ours: dict[str, Any], golden: dict[str, Any]
) -> str | None:
    history = case["history"] or ()
    texts = [case["system"], case["query"], *(text for turn in history for text in turn)]
    expected, reason = text_of(golden["ids"], tokenizer), None
    if any(text is None for text in texts[2:]):
        reason = ONE_NEWLINE
        expected = expected.replace("<|im_end|>\n\n<|im_start|>", "<|im_end|>\n<|im_start|>")
    if any(text and SPELLED.search(text) for text in texts):
        reason = reason or NO_FORGERY
    same = ours != REFUSED and text_of(ours["ids"], tokenizer) == expected
    return reason if same else None


def answer_text(
    case: dict[str, Any], tokenizer: QwenTokenizer, ours: str, golden: str
) -> str | None:
    """Derives the recorded text as the original's `decode_tokens` does."""
    ids, before = case["generated_ids"], case["raw_text"]
    cut = len(before) - len(unicodedata.normalize("NFC", before))
    stops: tuple[int, ...] = ()
    if case["chat_format"] == "raw":
        text = tokenizer.decode(ids)[max(cut, 0) :].replace("<|endoftext|>", "").strip()
    else:
        stops = (tokenizer.im_end_id, tokenizer.im_start_id)
        end = next((i for i, token_id in enumerate(ids) if token_id in stops), len(ids) - 1)
        text = tokenizer.decode(ids[:end])[max(cut, 0) :].strip()
    if text != golden:
        return None
    if cut > 0:
        return NORMALIZED_PROMPT
    if stops and not set(stops) & set(ids):
        return LAST_TOKEN
    if tokenizer.pad_id in ids:
        return FIRST_STOP
    return ONLY_BOXES if SPELLED.search(text) else None


def shown_history(expected: Any, ours: Any, golden: Any) -> str | None:
    """Recognizes a history whose last answer is the text of all ids except the last one.

    Args:
        expected: this history.
    """
    return SHOWN_TEXT if golden == expected else None


# -- training samples -----------------------------------------------------------------------------


def finetune_sample(
    case: dict[str, Any],
    tokenizer: QwenTokenizer,
    encode: Callable[..., dict[str, Any]],
    ours: dict[str, Any],
    golden: dict[str, Any],
) -> str | None:
    """Explains a sample of the published script.

    Args:
        encode: returns our sample of conversations, without a limit of its length.
    """
    messages = case["conversations"]
    if golden == REFUSED:
        return OWN_SYSTEM if any(message["from"] == "system" for message in messages) else None
    if ours == REFUSED:
        whole, limit = encode(messages), case.get("max_len")
        if whole == REFUSED or len(case["input_ids"]) != limit:
            return None
        cut = golden["ids"]
        if tokenizer.img_start_id in cut:  # the limit is inside of an image's span
            cut = cut[: cut.index(tokenizer.img_start_id)]
        kept = text_of(cut, tokenizer).rstrip("\ufffd")
        return CUT_RIGHT if text_of(whole["ids"], tokenizer).startswith(kept) else None
    if messages[0]["from"] == "assistant" and _same_text(encode(messages[1:]), golden, tokenizer):
        return FIRST_ANSWER
    spelled = any(SPELLED.search(message["value"]) for message in messages)
    return NO_FORGERY if spelled and _same_text(ours, golden, tokenizer) else None


def swift_sample(
    case: dict[str, Any], tokenizer: QwenTokenizer, ours: dict[str, Any], golden: dict[str, Any]
) -> str | None:
    """Explains a sample of ms-swift."""
    row = case["example"]
    if golden == REFUSED or ours == REFUSED:
        several = golden == REFUSED and '"bbox": [[' in _as_text(row.get("objects", ""))
        return SEVERAL_BOXES if several else None
    if ours["ids"] == golden["ids"]:
        pairs = zip(ours["labels"], golden["labels"], strict=True)
        more = all(label in (None, our_label) for our_label, label in pairs)
        in_answer = re.search("<image>|<img>", row.get("response", ""))
        return ONLY_THE_SPAN if more and in_answer else None
    reasons: list[str] = []
    expected = text_of(golden["ids"], tokenizer)
    texts = [row["query"], row.get("response", ""), row.get("system") or ""]
    for turn in row.get("history") or ():
        texts += turn
    if row.get("system", case.get("default_system")) == "":
        reasons.append(EMPTY_SYSTEM)
        expected = EMPTY_MESSAGE + expected
    if PREFIX_TWICE.search(expected):
        reasons.append(NAMED_ONCE)
        expected = PREFIX_TWICE.sub(r"\1\2", expected)
    if any(SPELLED.search(text) for text in texts):
        reasons.append(NO_FORGERY)
    if any(text[:1].isspace() for text in texts):
        reasons.append(APART)
    same = text_of(ours["ids"], tokenizer) == expected
    same &= supervised_text(ours, tokenizer) == supervised_text(golden, tokenizer)
    return reasons[0] if same and reasons else None


def differences(source: dict[str, Any], ours: dict[str, Any], golden: dict[str, Any]) -> str | None:
    """Explains how the samples of the published script and of ms-swift differ."""
    if not ours["swift_ids_are_finetune_ids_without_last_newline"]:
        return None
    texts = [source.get("system_message") or ""]
    texts += [message["value"] for message in source["conversations"]]
    if any(SPELLED.search(text) for text in texts):
        return NO_FORGERY
    if ours["n_finetune"] != golden["n_finetune"]:
        return None
    if source.get("system_message") == "":
        return EMPTY_SYSTEM
    return APART if any(text[:1].isspace() for text in texts) else None


def _same_text(ours: dict[str, Any], golden: dict[str, Any], tokenizer: QwenTokenizer) -> bool:
    """Whether two samples have the same text, and supervise the same part of it."""
    if ours == REFUSED or text_of(ours["ids"], tokenizer) != text_of(golden["ids"], tokenizer):
        return False
    return supervised_text(ours, tokenizer) == supervised_text(golden, tokenizer)


def _as_text(objects: Any) -> str:
    return objects if isinstance(objects, str) else json.dumps(objects)
