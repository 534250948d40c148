"""Scores of answers and captions, in the protocol `official` if a metric has two."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from parity.result import Result, read, same
from qwenvl_lit.metrics.anls import anls
from qwenvl_lit.metrics.captions import N, bleu, bleu_counts, cider, rouge_l
from qwenvl_lit.metrics.exact_match import exact_match
from qwenvl_lit.metrics.gqa_accuracy import gqa_answer_official
from qwenvl_lit.metrics.ptb import ptb_words
from qwenvl_lit.metrics.relaxed_accuracy import relaxed_match_official
from qwenvl_lit.metrics.vqa_accuracy import (
    normalize_words_official,
    remove_punctuation_official,
    vqa_accuracy_official,
)

SCORE = 1e-9
METRICS = {f"Bleu_{n}": "BLEU" for n in range(1, N + 1)} | {"ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}


def near(case: str, of: str, ours: float, golden: float) -> Result:
    return Result(case=case, of=of, deviation=abs(ours - golden), allowed=SCORE, ours=ours)


def several(annotation: str | list[str]) -> list[str]:
    return [annotation] if isinstance(annotation, str) else annotation


def anls_scores(path: Path) -> Iterator[Result]:
    data, scores = read(path), []
    for number, case in enumerate(data["cases"]):
        scores.append(anls(case["answer"], case["answers"], data["threshold"], protocol="official"))
        yield near(f"{number}: {case['answer']}", "ANLS", scores[-1], case["score"])
    yield near("anls", "ANLS", fmean(scores), data["anls"])


def relaxed_and_exact(path: Path) -> Iterator[Result]:
    data, relaxed, exact = read(path), [], []
    for number, case in enumerate(data["cases"]):
        name = f"{number}: {case['answer']} for {case['annotation']}"
        answers = several(case["annotation"])
        each = [relaxed_match_official(case["answer"], answer) for answer in answers]
        relaxed.append(any(each))
        exact.append(float(exact_match(case["answer"], answers, ignore_case=True)))
        golden = [case["relaxed_per_annotation"], case["relaxed"]]
        yield same(name, "relaxed", [each, relaxed[-1]], golden)
        yield same(name, "exact match", exact[-1], case["exact"])
    yield near("relaxed_accuracy", "accuracy", fmean(relaxed), data["relaxed_accuracy"])
    yield near("exact_match_accuracy", "accuracy", fmean(exact), data["exact_match_accuracy"])


def gqa(path: Path) -> Iterator[Result]:
    for case in read(path)["cases"]:
        name = f"{case['answer']} for {case['annotation']}"
        processed = gqa_answer_official(case["answer"])
        yield same(name, "clean answer", processed, case["processed"])
        right = float(exact_match(processed, [case["annotation"]], ignore_case=True))
        yield same(name, "right", right, case["score"])


def vqa_normalisation(path: Path) -> Iterator[Result]:
    for case in read(path)["cases"]:
        text = case["text"]
        yield same(text, "punctuation", remove_punctuation_official(text), case["punctuation"])
        yield same(text, "words", normalize_words_official(text), case["digit_article"])
        both = normalize_words_official(remove_punctuation_official(text))
        yield same(text, "both", both, case["both"])


def vqa_accuracy(path: Path) -> Iterator[Result]:
    """Compares percentages, rounded to two digits, of each question, of each type, and of all."""
    data = read(path)
    scores: dict[str, dict[str, list[float]]] = {
        "perQuestionType": defaultdict(list),
        "perAnswerType": defaultdict(list),
    }
    everything = []
    for case in data["cases"]:
        numbered = "answer_id" in case["answers"][0]
        references = [answer["answer"] for answer in case["answers"]]
        score = vqa_accuracy_official(case["answer"], references, numbered=numbered)
        everything.append(score)
        scores["perQuestionType"][case["question_type"]].append(score)
        scores["perAnswerType"][case["answer_type"]].append(score)
        yield same(str(case["question_id"]), "accuracy", round(100 * score, 2), case["score"])
    overall = round(100 * sum(everything) / len(everything), 2)
    yield same("overall", "accuracy", overall, data["accuracy"]["overall"])
    for kind, by_name in scores.items():
        ours = {name: round(100 * sum(each) / len(each), 2) for name, each in by_name.items()}
        yield same(kind, "accuracy", ours, data["accuracy"][kind])


def _scores(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Returns our scores of every caption, and of the corpus."""
    captions = [ptb_words(case["caption"]) for case in cases]
    references = [list(map(ptb_words, case["references"])) for case in cases]
    ciders = cider(captions, references).tolist()
    counts, rows = [], []
    for index, case in enumerate(cases):
        counts.append(bleu_counts(case["caption"], tuple(case["references"])))
        row = {f"Bleu_{n}": bleu(counts[-1], n) for n in range(1, N + 1)}
        row["ROUGE_L"] = rouge_l(captions[index], references[index])
        rows.append({**row, "CIDEr": ciders[index]})
    summed = [sum(column) for column in zip(*counts, strict=True)]
    corpus = {f"Bleu_{n}": bleu(summed, n) for n in range(1, N + 1)}
    for of in ("ROUGE_L", "CIDEr"):
        corpus[of] = fmean(row[of] for row in rows)
    return rows, corpus


def captions(path: Path) -> Iterator[Result]:
    data = read(path)
    rows, corpus = _scores(data["cases"])
    for case, ours in zip(data["cases"], rows, strict=True):
        name = json.dumps([case["id"], case["caption"]], ensure_ascii=False)
        tokens = [" ".join(ptb_words(text)) for text in (case["caption"], *case["references"])]
        golden = [case["tokenised_caption"], *case["tokenised_references"]]
        yield same(name, "tokens", tokens, golden)
        for of in METRICS:
            yield near(name, METRICS[of], ours[of], case[of])
    for of in METRICS:
        yield near("corpus", METRICS[of], corpus[of], data["corpus"][of])


def captions_subset(path: Path) -> Iterator[Result]:
    data, everything = read(path), read(path.parent / "captions.json")["cases"]
    _, corpus = _scores([case for case in everything if case["id"] in data["ids"]])
    for of in METRICS:
        yield near("corpus", METRICS[of], corpus[of], data[of])


CHECKS = {
    "metrics/anls.json": anls_scores,
    "metrics/relaxed_and_exact.json": relaxed_and_exact,
    "metrics/gqa.json": gqa,
    "metrics/vqa_normalisation.json": vqa_normalisation,
    "metrics/vqa_accuracy.json": vqa_accuracy,
    "metrics/captions.json": captions,
    "metrics/captions_subset.json": captions_subset,
}
