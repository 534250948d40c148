"""Which metrics would fit a user's own test set, told by the form of its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from qwenvl_lit.metrics.vqa_accuracy import PEOPLE
from qwenvl_lit.types import Conversation, GroundedObject

LOOKED_AT = 500  # rows
_NUMBER = re.compile(r"[$€£]?-?\d[\d.,]*%?")


def proposals(rows: Sequence[Conversation]) -> list[tuple[str, str]]:
    """Files of conf/metrics that fit, the likeliest first, and why; nothing where no row has an answer."""
    some = [rows[place] for place in islice(range(len(rows)), LOOKED_AT)]
    answered = [row for row in some if row.answer or row.references]
    if not answered:
        return []
    if any(row.options for row in answered):
        return [("choice", "there are options to choose from")]
    boxed = [
        row
        for row in answered
        if row.answer
        and any(isinstance(part, GroundedObject) and part.boxes for part in row.answer.parts)
    ]
    if len(boxed) > len(answered) / 2:
        return [("grounding", "the answers are boxes")]
    texts = [
        row.references or ("".join(part for part in row.answer.parts if isinstance(part, str)),)
        for row in answered
    ]
    words = sum(len(text[0].split()) for text in texts) / len(texts)
    people = sum(len(text) >= PEOPLE for text in texts) > len(texts) / 2
    if words > 5:
        return [("caption", f"the answers are sentences, {words:.0f} words on average")]
    if sum(bool(_NUMBER.fullmatch(text[0].strip())) for text in texts) > len(texts) / 2:
        return [
            ("chartqa", "the answers are numbers: right within 5 %"),
            ("exact", "or to the letter"),
        ]
    if people:
        return [
            ("vqa", "several people answered, shortly"),
            ("docvqa", "or any of the answers is right, nearly so in part"),
        ]
    return [
        ("exact", "the answers are short: right to the letter"),
        ("docvqa", "or nearly right in part, as for text that is read"),
        ("gqa", "or said in a sentence"),
    ]
