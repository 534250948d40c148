import math

import pytest
import torch

from qwenvl_lit.metrics.token_scores import TokenScores


def test_batches_count_by_their_tokens():
    whole, rank0, rank1 = TokenScores(), TokenScores(), TokenScores()
    for metric, batches in (
        (whole, ((6.0, 3, 2), (2.0, 1, 0))),
        (rank0, ((6.0, 3, 2),)),
        (rank1, ((2.0, 1, 0),)),
    ):
        for loss, tokens, correct in batches:
            metric.update(torch.tensor(loss), tokens, torch.tensor(correct))
    rank0.merge_state(rank1)
    for metric in (whole, rank0):
        scores = metric.compute()
        assert {name: value.item() for name, value in scores.items()} == {
            "loss": 2,
            "perplexity": math.exp(2),
            "token_accuracy": 0.5,
        }


def test_many_small_batches_lose_nothing():
    metric = TokenScores()
    for _ in range(10_000):
        metric.update(torch.tensor(0.1, dtype=torch.bfloat16), 1, 1)
    assert metric.compute()["loss"].item() == pytest.approx(
        torch.tensor(0.1, dtype=torch.bfloat16).item(), rel=1e-12
    )


def test_without_tokens_there_is_no_score():
    metric = TokenScores()
    metric.update(torch.tensor(0.0), 0, 0)  # every row of the batch was dropped
    assert all(value.isnan() for value in metric.compute().values())
