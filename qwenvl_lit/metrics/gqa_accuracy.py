"""Accuracy on GQA, whose expected answers are a word or two, of models that answer in sentences."""

from __future__ import annotations

import re

from qwenvl_lit.metrics.exact_match import exact_match
from qwenvl_lit.metrics.sample_mean import ProtocolMean
from qwenvl_lit.metrics.sample_rows import reference_texts, said
from qwenvl_lit.types import Prediction


def first_clause(text: str) -> str:
    """What stands before the first full stop, comma or exclamation mark, lower-cased, without an article in front.

    >>> first_clause("The panda, probably.")
    'panda'
    """
    clause = re.split(r"[.,!](?!\d)", text.strip().lower())[0]
    return re.sub(r"^(?:an?|the)\s+", "", " ".join(clause.split()))


def core_of(text: str) -> str:
    """What a first clause says: behind `is` or `are`, without an article in front, before `of`.

    >>> core_of("It is a piece of cake."), core_of("panda")
    ('piece', 'panda')
    """
    said_of_it = re.split(r"\b(?:is|are)\s+", first_clause(text), maxsplit=1)[-1]
    return re.split(r"\s+of\b", first_clause(said_of_it), maxsplit=1)[0]


def gqa_answer_official(text: str) -> str:
    """What Qwen-VL's script compares: it looks for these words inside others too, so that `panda is` becomes nothing but `is`."""
    text = re.split("[.,!]", text.strip())[0].lower()
    for mark in ("is ", "are ", "a ", "an ", "the "):
        text = [*text.split(mark), ""][1] if mark in text else text
    return text.split(" of")[0].strip()


def gqa_match(answer: str, expected: str) -> bool:
    """Whether the first clause of an answer, or the core of it, is the expected answer.

    >>> gqa_match("It is a dog.", "dog"), gqa_match("Yes.", "yes"), gqa_match("left side of the road", "right side of the road")
    (True, True, False)
    """
    return first_clause(expected) in (first_clause(answer), core_of(answer))


class GQAAccuracy(ProtocolMean):
    """Share of answers that say the expected one."""

    needs = "expected answer"

    def score(self, prediction: Prediction) -> float | None:
        answers = reference_texts(prediction)
        if not answers:
            return None
        if self.protocol == "official":
            return float(
                exact_match(gqa_answer_official(said(prediction)), answers, ignore_case=True)
            )
        return float(any(gqa_match(said(prediction), answer) for answer in answers))
