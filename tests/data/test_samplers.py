from collections import Counter

import numpy as np
import pytest

from qwenvl_lit.data.samplers import BatchSampler

LENGTHS = np.random.default_rng(0).integers(10, 100, size=5000)


def of_ranks(world_size: int, *arguments, **options) -> list[list[list[int]]]:
    return [
        list(BatchSampler(*arguments, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]


def padding(batches: list[list[int]]) -> float:
    """The share of slots that padding takes."""
    slots = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    return 1 - sum(LENGTHS[batch].sum() for batch in batches) / slots


WAYS = {
    "plain": {"batch_size": 8},
    "grouped": {"batch_size": 8, "group_by_length": True},
    "budget": {"max_tokens": 400},
    "grouped budget": {"max_tokens": 400, "group_by_length": True},
    "packed": {"max_tokens": 400, "packing": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(way):
    batches = BatchSampler([1000, 4000], lengths=LENGTHS, seed=1, **WAYS[way])
    first = list(batches)
    assert len(first) == len(batches)
    assert sorted(row for batch in first for row in batch) == list(range(5000))
    assert first == list(BatchSampler([1000, 4000], lengths=LENGTHS, seed=1, **WAYS[way]))
    batches.set_epoch(1)
    second = list(batches)
    assert sorted(row for batch in second for row in batch) == list(range(5000))
    assert second != first
    assert len(second) == len(first)
    assert first != list(BatchSampler([1000, 4000], lengths=LENGTHS, seed=2, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_stages_come_one_after_the_other_and_share_no_batch(way):
    stages = [
        0 if max(batch) < 1001 else 1
        for batch in BatchSampler([1001, 3999], lengths=LENGTHS, **WAYS[way])
        if min(batch) < 1001
    ]
    assert set(stages) == {0}
    order = [
        min(batch) >= 1001 for batch in BatchSampler([1001, 3999], lengths=LENGTHS, **WAYS[way])
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_goes_on_at_any_batch(way):
    whole = BatchSampler([5000], lengths=LENGTHS, **WAYS[way])
    whole.set_epoch(3)
    later = BatchSampler([5000], lengths=LENGTHS, position=lambda: (3, 20), **WAYS[way])
    assert list(later) == list(whole)[20:]


@pytest.mark.parametrize("way", WAYS)
def test_ranks_have_equally_many_batches_and_lose_no_row(way):
    for rows in (2, 100, 997):
        shares = of_ranks(3, [rows], lengths=LENGTHS[:rows], **WAYS[way])
        assert len({len(share) for share in shares}) == 1
        batches = [tuple(batch) for share in shares for batch in share]
        assert {row for batch in batches for row in batch} == set(range(rows))
        repeated = Counter(batches).total() - len(set(batches))
        assert repeated < 3, "no more than it takes to divide evenly"


def test_more_ranks_than_batches_repeat_them_all():
    shares = of_ranks(5, [2], batch_size=1)
    assert [len(share) for share in shares] == [1] * 5
    assert {row for share in shares for batch in share for row in batch} == {0, 1}


def test_grouped_rows_are_alike_within_a_batch_and_a_step():
    plain, grouped = (
        list(BatchSampler([5000], lengths=LENGTHS, batch_size=16, group_by_length=grouped))
        for grouped in (False, True)
    )
    assert padding(plain) > 0.3
    assert padding(grouped) < 0.03
    means = [LENGTHS[batch].mean() for batch in grouped]
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.5, (
        "long and short batches alternate at random"
    )
    one, other = of_ranks(2, [5000], lengths=LENGTHS, batch_size=16, group_by_length=True)
    apart = [abs(LENGTHS[a].mean() - LENGTHS[b].mean()) for a, b in zip(one, other, strict=True)]
    assert np.mean(apart) < 3


def test_no_batch_is_over_its_budget_and_few_are_far_below():
    for way, fill in (("budget", 0.55), ("grouped budget", 0.85)):
        batches = list(BatchSampler([5000], lengths=LENGTHS, **WAYS[way]))
        padded = [len(batch) * LENGTHS[batch].max() for batch in batches]
        assert max(padded) <= 400
        assert LENGTHS.sum() / 400 / len(batches) > fill
    packed = list(BatchSampler([5000], lengths=LENGTHS, **WAYS["packed"]))
    assert max(LENGTHS[batch].sum() for batch in packed) <= 400
    assert LENGTHS.sum() / 400 / len(packed) > 0.98


@pytest.mark.parametrize("max_tokens", [4096, 8192])
@pytest.mark.parametrize("rows", [500, 4000])
def test_packed_rows_of_a_mixed_set_are_real_tokens(rows, max_tokens):
    """From 32 to 1,500 tokens, with up to four images of 258; 0.98 or more."""
    draw = np.random.default_rng(rows)
    lengths = (draw.integers(0, 5, rows) * 258 + draw.integers(32, 469, rows)).clip(max=1500)
    batches = BatchSampler([rows], lengths=lengths, max_tokens=max_tokens, packing=True)
    packed = list(batches)
    assert lengths.sum() / (len(packed) * max_tokens) >= 0.95
    assert batches.max_rows == max(map(len, packed))


def test_a_row_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="row 1 has 50 tokens, more than max_tokens=40"):
        BatchSampler([3], lengths=np.array([3, 50, 4]), max_tokens=40)


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"max_tokens": 5}, {"group_by_length": True}]
)
def test_options_that_lack_another_are_refused(options):
    with pytest.raises(ValueError, match=r"needs data\.max_tokens|need the length"):
        BatchSampler([3], **options)


def test_no_rows_make_no_batch():
    for options in WAYS.values():
        assert list(BatchSampler([0], lengths=LENGTHS[:0], **options)) == []
