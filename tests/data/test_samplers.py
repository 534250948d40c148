from collections import Counter

import numpy as np
import pytest

from qwenvl_lit.data.samplers import BatchSampler

LENGTHS = np.random.default_rng(0).integers(10, 100, size=5000)


def batches_by_rank(world_size: int, *arguments, **options) -> list[list[list[int]]]:
    return [
        list(BatchSampler(*arguments, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]


def padding(batches: list[list[int]]) -> float:
    """Returns the share of tokens that are padding."""
    slots = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    return 1 - sum(LENGTHS[batch].sum() for batch in batches) / slots


OPTIONS = {
    "plain": {"batch_size": 8},
    "grouped": {"batch_size": 8, "group_by_length": True},
    "max tokens": {"max_tokens": 400},
    "grouped max tokens": {"max_tokens": 400, "group_by_length": True},
    "packed": {"max_tokens": 400, "packing": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_epoch_has_every_row_once_in_its_own_order(options):
    batches = BatchSampler([1000, 4000], lengths=LENGTHS, seed=1, **options)
    first = list(batches)
    assert len(first) == len(batches)
    assert sorted(row for batch in first for row in batch) == list(range(5000))
    assert first == list(BatchSampler([1000, 4000], lengths=LENGTHS, seed=1, **options))
    batches.set_epoch(1)
    second = list(batches)
    assert sorted(row for batch in second for row in batch) == list(range(5000))
    assert second != first
    assert len(second) == len(first)
    assert first != list(BatchSampler([1000, 4000], lengths=LENGTHS, seed=2, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_stages_follow_each_other_and_share_no_batch(options):
    batches = list(BatchSampler([1001, 3999], lengths=LENGTHS, **options))
    first_stage = [batch for batch in batches if min(batch) < 1001]
    assert all(max(batch) < 1001 for batch in first_stage)
    assert batches[: len(first_stage)] == first_stage


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_epoch_can_be_resumed_at_any_batch(options):
    whole = BatchSampler([5000], lengths=LENGTHS, **options)
    whole.set_epoch(3)
    later = BatchSampler([5000], lengths=LENGTHS, position=lambda: (3, 20), **options)
    assert list(later) == list(whole)[20:]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ranks_have_the_same_number_of_batches_and_no_row_is_lost(options):
    for rows in (2, 100, 997):
        shares = batches_by_rank(3, [rows], lengths=LENGTHS[:rows], **options)
        assert len({len(share) for share in shares}) == 1
        batches = [tuple(batch) for share in shares for batch in share]
        assert {row for batch in batches for row in batch} == set(range(rows))
        repeated = Counter(batches).total() - len(set(batches))
        assert repeated < 3, "only as many as dividing evenly takes"


def test_batches_are_repeated_if_there_are_more_ranks():
    shares = batches_by_rank(5, [2], batch_size=1)
    assert [len(share) for share in shares] == [1] * 5
    assert {row for share in shares for batch in share for row in batch} == {0, 1}


def test_grouped_rows_have_similar_lengths_within_a_batch_and_a_step():
    plain, grouped = (
        list(BatchSampler([5000], lengths=LENGTHS, batch_size=16, group_by_length=grouped))
        for grouped in (False, True)
    )
    assert padding(plain) > 0.3
    assert padding(grouped) < 0.03
    means = [LENGTHS[batch].mean() for batch in grouped]
    correlation = np.corrcoef(means[:-1], means[1:])[0, 1]
    assert correlation < 0.5, "long and short batches are in random order"
    one, other = batches_by_rank(2, [5000], lengths=LENGTHS, batch_size=16, group_by_length=True)
    differences = []
    for a, b in zip(one, other, strict=True):
        differences.append(abs(LENGTHS[a].mean() - LENGTHS[b].mean()))
    assert np.mean(differences) < 3


def test_no_batch_exceeds_max_tokens_and_few_are_far_below():
    for name, fill in (("max tokens", 0.55), ("grouped max tokens", 0.85)):
        batches = list(BatchSampler([5000], lengths=LENGTHS, **OPTIONS[name]))
        padded = [len(batch) * LENGTHS[batch].max() for batch in batches]
        assert max(padded) <= 400
        assert LENGTHS.sum() / 400 / len(batches) > fill
    packed = list(BatchSampler([5000], lengths=LENGTHS, **OPTIONS["packed"]))
    assert max(LENGTHS[batch].sum() for batch in packed) <= 400
    assert LENGTHS.sum() / 400 / len(packed) > 0.98


@pytest.mark.parametrize("max_tokens", [4096, 8192])
@pytest.mark.parametrize("rows", [500, 4000])
def test_packed_rows_of_mixed_lengths_have_little_padding(rows, max_tokens):
    """Rows of 32 to 1,500 tokens with up to four images of 258 tokens; measured: 0.98 or more."""
    draw = np.random.default_rng(rows)
    lengths = (draw.integers(0, 5, rows) * 258 + draw.integers(32, 469, rows)).clip(max=1500)
    batches = BatchSampler([rows], lengths=lengths, max_tokens=max_tokens, packing=True)
    packed = list(batches)
    assert lengths.sum() / (len(packed) * max_tokens) >= 0.95
    assert batches.max_rows == max(map(len, packed))


def test_a_row_above_max_tokens_is_refused():
    with pytest.raises(ValueError, match="row 1 has 50 tokens, more than max_tokens=40"):
        BatchSampler([3], lengths=np.array([3, 50, 4]), max_tokens=40)


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"max_tokens": 5}, {"group_by_length": True}]
)
def test_an_option_that_lacks_one_it_requires_is_refused(options):
    with pytest.raises(ValueError, match=r"needs data\.max_tokens|need the length"):
        BatchSampler([3], **options)


def test_without_rows_there_is_no_batch():
    for options in OPTIONS.values():
        assert list(BatchSampler([0], lengths=LENGTHS[:0], **options)) == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_joined_batches_are_those_of_accumulated_steps(ranks):
    """1,000 rows: 250 steps of 4 rows on one rank, 125 of 8 on two, 84 of 12 on three."""
    one_by_one = batches_by_rank(ranks, [300, 700], seed=1)
    joined = batches_by_rank(ranks, [300, 700], seed=1, batches_per_step=4)
    for rows, steps in zip(one_by_one, joined, strict=True):
        assert [row for step in steps for row in step] == [row for (row,) in rows]
        assert {len(step) for step in steps[:-1]} == {4}
        assert len(steps) == -(-len(rows) // 4)


def test_joined_batches_can_be_resumed_after_any_step():
    whole = list(BatchSampler([1001], seed=1, batches_per_step=4))
    later = BatchSampler([1001], seed=1, batches_per_step=4, position=lambda: (0, 20))
    assert len(later) == len(whole) == 251
    assert list(later) == whole[20:]
