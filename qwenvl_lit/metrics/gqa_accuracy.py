"""Accuracy on GQA. Its expected answers are one or two words; a model may answer in sentences."""

from __future__ import annotations

import re

from qwenvl_lit.metrics.exact_match import exact_match
from qwenvl_lit.metrics.per_sample import answer_text, reference_texts
from qwenvl_lit.metrics.sample_mean import ProtocolMean
from qwenvl_lit.types import Prediction


def first_clause(text: str) -> str:
    """Returns the text before the first full stop, comma or exclamation mark.

    The clause is converted to lower case, and a leading article is removed.

    >>> first_clause("The panda, probably.")
    'panda'
    """
    clause = re.split(r"[.,!](?!\d)", text.strip().lower())[0]
    return re.sub(r"^(?:an?|the)\s+", "", " ".join(clause.split()))


def core_of(text: str) -> str:
    """Returns the words of the first clause after `is` or `are` and before `of`.

    A leading article is removed.

    >>> core_of("It is a piece of cake."), core_of("panda")
    ('piece', 'panda')
    """
    predicate = re.split(r"\b(?:is|are)\s+", first_clause(text), maxsplit=1)[-1]
    return re.split(r"\s+of\b", first_clause(predicate), maxsplit=1)[0]


def gqa_answer_official(text: str) -> str:
    """Returns the text that Qwen-VL's evaluation script compares with the expected answer.

    The script also finds "is ", "a " and so on at the end of other words: "sea horse" becomes
    "horse".
    """
    text = re.split("[.,!]", text.strip())[0].lower()
    for mark in ("is ", "are ", "a ", "an ", "the "):
        if mark in text:
            text = text.split(mark)[1]
    return text.split(" of")[0].strip()


def gqa_match(answer: str, expected: str) -> bool:
    """Returns whether the expected answer is the first clause of `answer` or its `core_of`.

    >>> gqa_match("It is a dog.", "dog"), gqa_match("Yes.", "yes")
    (True, True)
    >>> gqa_match("left side of the road", "right side of the road")
    False
    """
    return first_clause(expected) in (first_clause(answer), core_of(answer))


class GQAAccuracy(ProtocolMean):
    """Fraction of answers that contain the expected answer as `gqa_match` defines it."""

    needs = "expected answer in words"

    def score(self, prediction: Prediction) -> float | None:
        references = reference_texts(prediction)
        if not references:
            return None
        answer = answer_text(prediction)
        if self.protocol == "official":
            return float(exact_match(gqa_answer_official(answer), references, ignore_case=True))
        return float(any(gqa_match(answer, reference) for reference in references))
