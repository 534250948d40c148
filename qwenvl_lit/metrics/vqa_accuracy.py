"""VQA accuracy: agreement of an answer with the answers of ten people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qwenvl_lit.metrics.per_sample import answer_text, reference_texts
from qwenvl_lit.metrics.sample_mean import ProtocolMean
from qwenvl_lit.types import Prediction

AGREEING = 3  # people with the same answer that make it correct
MIN_PEOPLE = AGREEING + 1  # after one person is left out, so many must remain
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions_by_misspelling(contractions: Sequence[str]) -> dict[str, str]:
    """Maps each contraction that lacks one apostrophe to its correct spelling."""
    contraction_of = {}
    for contraction in contractions:
        for index, sign in enumerate(contraction):
            if sign == "'":
                misspelling = contraction[:index] + contraction[index + 1 :]
                contraction_of[misspelling] = contraction
    return contraction_of


_SPELLING = _contractions_by_misspelling([*_CONTRACTIONS.split(), "somebody'd", "i'm", "i've"])
# The published script maps "somebody'd" to the misspelling. Its entries for `Im` and `Ive` have no
# effect, because answers are in lower case.
_SPELLING_OFFICIAL = {
    **_contractions_by_misspelling(_CONTRACTIONS.split()),
    "somebody'd": "somebodyd",
}


def normalize_answer(text: str) -> str:
    """Normalizes an answer as the VQA evaluation page defines it.

    - Letters are converted to lower case.
    - Commas inside numbers and full stops other than decimal points are removed.
    - Any other punctuation mark becomes a space.
    - Number words up to ten become digits.
    - Articles are removed.
    - Contractions get their apostrophes.

    >>> normalize_answer("The T-shirt, size 1,000."), normalize_answer("Dont know")
    ('t shirt size 1000', "don't know")
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    punctuation_to_space = dict.fromkeys(map(ord, _PUNCTUATION), " ")
    return _replace_words(text.translate(punctuation_to_space), _SPELLING)


def remove_punctuation_official(text: str) -> str:
    """Removes punctuation as the published script does.

    All occurrences of a punctuation mark are deleted if one of them is next to a space, or if the
    text has a comma between digits. Otherwise they become spaces. At most 32 full stops are
    deleted.
    """
    has_comma_in_number = re.search(r"\d,\d", text)
    result = text
    for mark in _PUNCTUATION:
        deleted = has_comma_in_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if deleted else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def normalize_words_official(text: str) -> str:
    """Normalizes case, number words, articles and contractions as the published script does."""
    return _replace_words(text.lower(), _SPELLING_OFFICIAL)


def _replace_words(text: str, spelling: Mapping[str, str]) -> str:
    words = []
    for word in text.split():
        word = _DIGITS.get(word, word)
        if word not in _ARTICLES:
            words.append(spelling.get(word, word))
    return " ".join(words)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the VQA accuracy of an answer, from 0 to 1.

    The accuracy against a set of people is min(agreeing people / 3, 1). The result is its mean over
    all subsets of `references` that leave one person out. Answers are compared after
    `normalize_answer`.

    The definition is for ten people. If fewer than three remain, all of them have to agree instead
    of three, and a single reference is compared with the answer.

    >>> vqa_accuracy("Two", ["2", "2", "2", "3", "3", "3", "3", "4", "5", "6"])
    0.9
    >>> vqa_accuracy("Two", ["2", "two", "3"]), vqa_accuracy("Two", ["2"])
    (0.6666666666666666, 1.0)
    """
    people = list(map(normalize_answer, references))
    if len(people) == 1:
        return float(normalize_answer(answer) == people[0])
    return _agreement(normalize_answer(answer), people, needed=min(AGREEING, len(people) - 1))


def vqa_accuracy_official(
    answer: str, references: Sequence[str], *, numbered: bool = True
) -> float:
    """Returns the accuracy as the published script computes it.

    The script removes punctuation from `references` only if they are not all equal. It does not
    normalize them any further. It divides by three even if fewer than three people remain: with
    three references the score is 2/3 at most, with a single one 0.

    Args:
        numbered: whether the annotations give each reference an id. Without ids, the script leaves
            out everyone whose answer equals that of the person to leave out.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    answer = normalize_words_official(remove_punctuation_official(answer))
    people = list(references)
    if len(set(people)) > 1:
        people = list(map(remove_punctuation_official, people))
    return _agreement(answer, people, equal_answers_stay=numbered)


def _agreement(
    answer: str, people: Sequence[str], *, needed: int = AGREEING, equal_answers_stay: bool = True
) -> float:
    """Averages min(agreeing people / needed, 1) over the subsets that leave one person out.

    Args:
        equal_answers_stay: whether other people with the same answer as the person who is left
            out remain in the subset.
    """
    agreeing = people.count(answer)
    accuracies = []
    for person in people:
        others = agreeing
        if person == answer:
            others = agreeing - 1 if equal_answers_stay else 0
        accuracies.append(min(others / needed, 1))
    return sum(accuracies) / len(people)


class VQAAccuracy(ProtocolMean):
    """Mean VQA accuracy against the answers of several people.

    The references of a row are the answers of these people. VQAv2, OK-VQA, TextVQA and VizWiz have
    ten per row. For rows with fewer than four see `vqa_accuracy` and `vqa_accuracy_official`.
    """

    needs = "expected answer in words"

    def score(self, prediction: Prediction) -> float | None:
        people = reference_texts(prediction)
        if not people:
            return None
        if self.protocol == "official":
            return vqa_accuracy_official(answer_text(prediction), people)
        return vqa_accuracy(answer_text(prediction), people)
