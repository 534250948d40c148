import math

import pytest
import torch

from qwenvl_lit.metrics.token_scores import TokenScores


def of_batches(*batches: tuple[float, int, int]) -> TokenScores:
    metric = TokenScores()
    for loss_sum, tokens, correct in batches:
        metric.update(torch.tensor(loss_sum), tokens, torch.tensor(correct))
    return metric


def test_batches_are_weighted_by_their_tokens():
    one_process = of_batches((6.0, 3, 2), (2.0, 1, 0))
    rank0, rank1 = of_batches((6.0, 3, 2)), of_batches((2.0, 1, 0))
    rank0.merge_state(rank1)
    expected = {"loss": 2, "perplexity": math.exp(2), "token_accuracy": 0.5}
    for metric in (one_process, rank0):
        scores = {name: value.item() for name, value in metric.compute().items()}
        assert scores == expected


def test_sums_of_many_small_batches_are_exact():
    loss = torch.tensor(0.1, dtype=torch.bfloat16)
    metric = TokenScores()
    for _ in range(10_000):
        metric.update(loss, 1, 1)
    assert metric.compute()["loss"].item() == pytest.approx(loss.item(), rel=1e-12)


def test_scores_are_nan_without_tokens():
    metric = TokenScores()
    metric.update(torch.tensor(0.0), 0, 0)  # every row of the batch was dropped
    assert all(value.isnan() for value in metric.compute().values())
