"""Rows that are chosen together, each with settings of its own, are chosen as each is alone."""

import pytest
import torch

from qwenvl_lit.generation.sampling import NextToken, Sampling

CPU = torch.device("cpu")
VOCABULARY = 50
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=1.0),
    Sampling(temperature=0.6, top_k=5),
    Sampling(temperature=1.7, top_p=0.8),
    Sampling(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=0.7),
    Sampling(top_k=1, top_p=0.1),  # greedy: they have no effect
    Sampling(temperature=3.0, top_k=VOCABULARY + 1),
]


def logits_of(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_rows_with_settings_of_their_own_are_chosen_as_each_alone():
    rows = len(SAMPLINGS)
    together = NextToken(rows, VOCABULARY, CPU)
    alone = []
    for row, sampling in enumerate(SAMPLINGS):
        prompt_ids = torch.arange(row, 3 * row)
        together.begin(row, sampling, prompt_ids, seed=row)
        inputs = {"input_ids": prompt_ids[None]}
        logits = torch.empty(1, VOCABULARY)
        alone.append(NextToken.of_batch(inputs, logits, (), sampling, seed=row))
    chosen = set()
    for step in range(20):
        logits = logits_of(rows, step)
        expected = [alone[row](logits[row : row + 1]).item() for row in range(rows)]
        assert together(logits).tolist() == expected
        chosen.update(expected)
    assert len(chosen) > 20


def test_some_of_the_rows_in_any_order():
    together, alone = NextToken(4, VOCABULARY, CPU), NextToken(1, VOCABULARY, CPU)
    sampling = Sampling(temperature=1.0, repetition_penalty=1.9)
    together.begin(2, sampling, torch.tensor([3, 4]), seed=5)
    alone.begin(0, sampling, torch.tensor([3, 4]), seed=5)
    for step in range(9):
        logits = logits_of(2, step)
        drawn, greedy = together(logits, rows=[2, 0]).tolist()
        assert drawn == alone(logits[:1]).item()
        assert greedy == logits[1].argmax()


def test_a_row_that_begins_anew_has_seen_nothing():
    next_token, penalty = NextToken(2, VOCABULARY, CPU), Sampling(repetition_penalty=100.0)
    logits = logits_of(2, 0).abs()
    next_token.begin(0, penalty)
    first = next_token(logits)
    assert next_token(logits)[0] != first[0]
    next_token.begin(0, penalty)
    assert next_token(logits)[0] == first[0]
    next_token.begin(0, Sampling())
    assert next_token(logits)[0] == next_token(logits)[0] == first[0]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}],
    ids=str,
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Sampling(**wrong)
