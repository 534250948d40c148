"""Scores of answers to questions that are answered with yes or no, as in POPE and MME."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import torch

from qwenvl_lit.metrics.per_sample import (
    PerSampleMetric,
    Where,
    answer_text,
    reference_texts,
    sample_key,
)
from qwenvl_lit.metrics.sample_mean import ProtocolMean, ScoringProtocol, check_protocol
from qwenvl_lit.types import Prediction

NEEDS = "expected answer yes or no"
_WORD = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)
YES, NO, NEITHER = 1, 0, -1
NAMES = {"yes": YES, "no": NO, "not": NO}


def yes_or_no(answer: str) -> int:
    """Returns YES or NO for the first of the words yes, no and not, or NEITHER without them.

    >>> [yes_or_no(answer) for answer in ("Yes, a dog.", "There is NO dog", "It is not", "A dog")]
    [1, 0, 0, -1]
    """
    found = _WORD.search(answer)
    return NAMES[found[1].lower()] if found else NEITHER


def yes_or_no_of_pope(answer: str) -> int:
    """Returns what POPE's script reads: YES unless the first sentence has the word no or not.

    "NO", and a "no" before a line break, count as yes.
    https://github.com/AoiDragon/POPE/blob/main/evaluate.py
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"}.intersection(words) else YES


def yes_or_no_of_mme(answer: str) -> int:
    """Returns what MME's script reads in the first four characters: "Now" counts as no.

    The script is eval_tool/calculation.py of MME_Benchmark_release_version.
    """
    beginning = answer.lower()[:4]
    if "yes" in beginning:
        return YES
    return NO if "no" in beginning else NEITHER


def expected_yes_or_no(prediction: Prediction) -> int | None:
    """Returns YES or NO, or None if the expected answer is something else or missing."""
    for text in reference_texts(prediction):
        word = text.strip().rstrip(".").lower()
        if word in ("yes", "no"):
            return NAMES[word]
    return None


class _YesNoMean(ProtocolMean):
    """A mean over rows whose expected answer is yes or no."""

    needs = NEEDS

    def answer(self, prediction: Prediction) -> int:
        """Returns YES, NO or NEITHER."""
        read = yes_or_no if self.protocol == "correct" else yes_or_no_of_pope
        return read(answer_text(prediction))


class YesNoAccuracy(_YesNoMean):
    """Fraction of right answers. An answer without yes, no and not is wrong."""

    def score(self, prediction: Prediction) -> float | None:
        expected = expected_yes_or_no(prediction)
        return None if expected is None else float(self.answer(prediction) == expected)


class YesRatio(_YesNoMean):
    """Fraction of answers that are yes. POPE's sets have as many rows for yes as for no."""

    def score(self, prediction: Prediction) -> float | None:
        if expected_yes_or_no(prediction) is None:
            return None
        return float(self.answer(prediction) == YES)


class _YesRetrieval(PerSampleMetric):
    """A score of the answers yes, which is no mean over rows. A row scores 1 if it is right.

    Args:
        protocol: "correct" reads answers as `yes_or_no`, "official" as POPE's script.
    """

    needs = NEEDS

    def __init__(self, protocol: ScoringProtocol = "correct", *, where: Where | None = None):
        super().__init__(where=where)
        self.protocol = check_protocol(protocol)

    def measure(self, prediction: Prediction) -> tuple[float, float] | None:
        expected = expected_yes_or_no(prediction)
        if expected is None:
            return None
        read = yes_or_no if self.protocol == "correct" else yes_or_no_of_pope
        return read(answer_text(prediction)), expected

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        answers, expected = torch.stack(list(rows)).unbind(1)
        return (answers == expected).double()

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        answers, expected = torch.stack(list(rows)).unbind(1)
        right = int(((answers == YES) & (expected == YES)).sum())
        return self.fraction(right, int((answers == YES).sum()), int((expected == YES).sum()))

    @abstractmethod
    def fraction(self, right: int, answered: int, expected: int) -> float:
        """Computes the score.

        Args:
            right: number of answers yes that are right.
            answered: number of answers yes.
            expected: number of rows whose expected answer is yes.
        """


class YesPrecision(_YesRetrieval):
    """Fraction of the answers yes that are right; 0 without such an answer."""

    def fraction(self, right: int, answered: int, expected: int) -> float:
        return right / max(answered, 1)


class YesRecall(_YesRetrieval):
    """Fraction of the rows for yes that are answered with yes; 0 without such a row."""

    def fraction(self, right: int, answered: int, expected: int) -> float:
        return right / max(expected, 1)


class YesF1(_YesRetrieval):
    """Harmonic mean of precision and recall of the answer yes: the score of POPE."""

    def fraction(self, right: int, answered: int, expected: int) -> float:
        return 2 * right / max(answered + expected, 1)


class MMEScore(PerSampleMetric):
    """The score of a subtask of MME, 0 to 2: accuracy plus accuracy+.

    Accuracy is the fraction of right answers. Accuracy+ is the fraction of images whose questions
    are all answered right (Fu et al., arXiv 2306.13394). Papers print the score times 100. A row
    scores 1 if it is right.

    Args:
        protocol: "correct" reads answers as `yes_or_no`, "official" as MME's script.
        pair_by: the column that has the same value for the questions about an image.
    """

    needs = f"{NEEDS}, or no name of its image"
    dtype_of_rows = torch.int64

    def __init__(
        self,
        protocol: ScoringProtocol = "correct",
        pair_by: str = "image_name",
        *,
        where: Where | None = None,
    ):
        super().__init__(where=where)
        self.protocol = check_protocol(protocol)
        self.pair_by = pair_by

    def measure(self, prediction: Prediction) -> tuple[int, int] | None:
        expected = expected_yes_or_no(prediction)
        image = prediction.conversation.columns.get(self.pair_by)
        if expected is None or image is None:
            return None
        read = yes_or_no if self.protocol == "correct" else yes_or_no_of_mme
        return read(answer_text(prediction)) == expected, sample_key(image)

    def row_scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(rows))[:, 0].double()

    def total(self, rows: Sequence[torch.Tensor]) -> float:
        right_of_image: dict[int, list[int]] = defaultdict(list)
        for right, image in torch.stack(list(rows)).tolist():
            right_of_image[image].append(right)
        right_images = sum(map(all, right_of_image.values()))
        right_rows = sum(map(sum, right_of_image.values()))
        return right_rows / len(rows) + right_images / len(right_of_image)
