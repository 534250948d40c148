"""Measures how long it takes to score captions.

    python scripts/bench_metrics.py [--record benchmarks/metrics.json]

The corpus has the size of COCO's val2014: 40,000 captions with five references each, whose words
are distributed as in a natural language (Zipf). One thread is used. Seconds are CPU time, so that
other processes on the machine do not matter.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from pathlib import Path

import torch
from records import write_record

from qwenvl_lit.metrics.captions import Bleu, CIDEr, RougeL
from qwenvl_lit.metrics.per_sample import PerSampleMetric
from qwenvl_lit.metrics.ptb import ptb_words
from qwenvl_lit.runs.versions import versions
from qwenvl_lit.types import Conversation, Prediction

ROWS, REFERENCES, WORDS, VOCABULARY, BATCH = 40_000, 5, 11, 20_000, 64


def corpus(seed: int = 0) -> list[Prediction]:
    """Captions of 8 to 14 words with a capital and a full stop; a quarter of them has a comma.

    The captions of a row share half of their words.
    """
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(VOCABULARY)]
    frequency = [1 / rank for rank in range(1, VOCABULARY + 1)]
    words = iter(rng.choices(vocabulary, frequency, k=2 * ROWS * (REFERENCES + 1) * (WORDS + 3)))

    def caption(common: list[str]) -> str:
        chosen = []
        for word in common[: WORDS + rng.randint(-3, 3)]:
            chosen.append(word if rng.random() < 0.5 else next(words))
        if rng.random() < 0.25:
            chosen[3] += ","
        return " ".join(chosen).capitalize() + "."

    predictions = []
    for row in range(ROWS):
        common = [next(words) for _ in range(WORDS + 3)]
        references = tuple(caption(common) for _ in range(REFERENCES))
        conversation = Conversation(id=str(row), turns=(), references=references)
        predictions.append(Prediction(conversation=conversation, text=caption(common), parts=()))
    return predictions


def measure(metric: PerSampleMetric, predictions: list[Prediction]) -> dict[str, float]:
    """Times the updates, which split the captions into words, and the computation of the score."""
    ptb_words.cache_clear()
    start, wall_start = time.process_time(), time.perf_counter()
    for first in range(0, len(predictions), BATCH):
        metric.update(predictions[first : first + BATCH])
    updated = time.process_time()
    score = float(metric.compute())
    computed, wall_end = time.process_time(), time.perf_counter()
    state_bytes = sum(tensor.nbytes for tensor in (*metric.keys, *metric.sizes, *metric.numbers))
    return {
        "update_seconds": round(updated - start, 2),
        "compute_seconds": round(computed - updated, 2),
        "wall_seconds": round(wall_end - wall_start, 2),
        "state_mb": round(state_bytes / 1e6, 1),
        "score": round(score, 6),
    }


def main(record: Path | None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    predictions = corpus()
    metrics = {"cider": CIDEr(), "bleu_4": Bleu(4), "rouge_l": RougeL()}
    result = {
        "command": "python scripts/bench_metrics.py",
        "device": "cpu",
        "threads": 1,
        "versions": versions(),
        "rows": ROWS,
        "references": REFERENCES,
        "metrics": {name: measure(metric, predictions) for name, metric in metrics.items()},
    }
    print(json.dumps(result, indent=1))
    if record:
        write_record(record, result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="also write the result here")
    main(parser.parse_args().record)
