"""VQA accuracy: how many of ten people gave the same answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qwenvl_lit.metrics.sample_mean import ProtocolMean
from qwenvl_lit.metrics.sample_rows import said
from qwenvl_lit.types import Prediction

PEOPLE = 4  # at least: with fewer, no answer has three others who agree whoever is left out
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(n)
    for n, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _spellings(words: Sequence[str]) -> dict[str, str]:
    """From a contraction with one of its apostrophes missing to the contraction."""
    return {
        word[:at] + word[at + 1 :]: word
        for word in words
        for at, sign in enumerate(word)
        if sign == "'"
    }


_SPELLED = _spellings([*_CONTRACTIONS.split(), "somebody'd", "i'm", "i've"])
_SPELLED_OFFICIAL = {
    **_spellings(_CONTRACTIONS.split()),
    "somebody'd": "somebodyd",
}  # the other way round there; `Im` never meets lower case


def normalised(text: str) -> str:
    """An answer as VQA's page defines it for comparing: lower case, no full stops but decimal points, no commas within numbers, other
    punctuation as spaces, digits for numbers up to ten, no articles, contractions with their apostrophes.

    >>> normalised("The T-shirt, size 1,000."), normalised("Dont know")
    ('t shirt size 1000', "don't know")
    """
    text = re.sub(r"\.(?!\d)", "", re.sub(r"(?<=\d),(?=\d)", "", text.lower()))
    return _reworded(text.translate(dict.fromkeys(map(ord, _PUNCTUATION), " ")), _SPELLED)


def without_punctuation_official(text: str) -> str:
    """Punctuation as the published script treats it: deleted where the mark stands next to a space anywhere in the text or any comma
    between digits, else a space; at most 32 full stops go."""
    numbers = re.search(r"\d,\d", text)
    left = text
    for mark in _PUNCTUATION:
        left = left.replace(
            mark, "" if numbers or f"{mark} " in text or f" {mark}" in text else " "
        )
    return re.sub(r"\.(?!\d)", "", left, count=32)


def reworded_official(text: str) -> str:
    """Lower case, numbers, articles and contractions as the published script treats them."""
    return _reworded(text.lower(), _SPELLED_OFFICIAL)


def _reworded(text: str, spelled: Mapping[str, str]) -> str:
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(spelled.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """The share of three people who agree, 1 at most, averaged over leaving each of `answers` out; compared as `normalised`.

    >>> vqa_accuracy("Two", ["2", "2", "2", "3", "3", "3", "3", "4", "5", "6"])
    0.9
    """
    answer, people = normalised(answer), [normalised(text) for text in answers]
    return _leaving_one_out([person == answer for person in people])


def vqa_accuracy_official(answer: str, answers: Sequence[str], *, numbered: bool = True) -> float:
    """The same as the published script counts it: people's answers lose punctuation, if they are not all equal, and are else as written.

    Args:
        numbered: the annotations give each answer an id; without ids the script leaves out all answers that equal the one left out.
    """
    answer = reworded_official(
        without_punctuation_official(answer.replace("\n", " ").replace("\t", " ").strip())
    )
    people = (
        [without_punctuation_official(text) for text in answers]
        if len(set(answers)) > 1
        else list(answers)
    )
    if numbered:
        return _leaving_one_out([person == answer for person in people])
    return sum(
        min(sum(other == answer != person for other in people) / 3, 1) for person in people
    ) / len(people)


def _leaving_one_out(agree: Sequence[bool]) -> float:
    return sum(min((sum(agree) - own) / 3, 1) for own in agree) / len(agree)


class VQAAccuracy(ProtocolMean):
    """Mean VQA accuracy against the answers of several people: the references of a row, ten in VQAv2, OK-VQA, TextVQA and VizWiz.

    Four at least, or no answer can be wholly right; rows with fewer are left out. Of one expected answer, ask for the exact match.
    """

    needs = "answers of four people or more"

    def score(self, prediction: Prediction) -> float | None:
        people = prediction.conversation.references
        if len(people) < PEOPLE:
            return None
        return (vqa_accuracy if self.protocol == "correct" else vqa_accuracy_official)(
            said(prediction), people
        )
