"""Optimizer steps, and rows to evaluate, are cut into batches that fit into memory."""

import math
import multiprocessing
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from qwenvl_lit.data.collate import TILE, Pack, Pad
from qwenvl_lit.data.micro_batches import ActivationCosts, BatchLimit, CutRows, CutStep
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import Conversation, Dropped, Sample

PACK = Pack(pad_id=0, collate_vision=concatenate_vision, max_rows=4, longest=900)


def sample(tokens: int, *, image_tokens: int = 0, targets: int = 1) -> Sample:
    labels = torch.full((tokens,), -100)
    labels[tokens - targets :] = 1
    return Sample(
        conversation=Conversation(id=str(tokens), turns=()),
        input_ids=torch.ones(tokens, dtype=torch.int64),
        labels=labels,
        vision_positions=torch.arange(image_tokens),
        vision={"pixel_values": torch.zeros(image_tokens // 4, 2)},
    )


def cut(max_bytes: float = math.inf, **options) -> CutStep:
    return CutStep(
        pad=Pad(pad_id=0, collate_vision=concatenate_vision),
        limit=BatchLimit(max_bytes),
        **options,
    )


def lengths(batches) -> list[tuple[int, ...]]:
    return [batch.lengths for batch in batches]


ROWS = [sample(tokens) for tokens in (300, 700, 100, 800)]


def test_without_a_limit_there_is_one_micro_batch():
    assert lengths(cut()(ROWS)) == [(800, 700, 300, 100)]
    (batch,) = cut(pack=PACK)(ROWS)
    assert batch.lengths == (800, 700, 300, 100)
    assert batch.input_ids.shape == (1, 1920)  # 1900, in tiles of 64


def test_padded_rows_of_similar_length_are_together():
    assert lengths(cut(1600)(ROWS)) == [(800, 700), (300, 100)]
    assert lengths(cut(1599)(ROWS)) == [(800,), (700, 300), (100,)]


def test_packed_rows_are_balanced_over_the_fewest_micro_batches():
    assert lengths(cut(1920, pack=PACK)(ROWS)) == [(800, 700, 300, 100)]
    assert lengths(cut(1919, pack=PACK)(ROWS)) == [(800, 100), (700, 300)]
    assert lengths(cut(900, pack=PACK)(ROWS)) == [(800,), (700,), (300, 100)]


@pytest.mark.parametrize("pack", [None, PACK], ids=["padded", "packed"])
def test_a_row_above_the_limit_is_alone(pack):
    assert lengths(cut(1, pack=pack)(ROWS)) == [(800,), (700,), (300,), (100,)]


def test_images_and_supervised_tokens_count():
    costs = ActivationCosts(per_token=1, per_image_token=10, per_target=100)
    rows = [sample(20, image_tokens=8, targets=2)] * 2
    assert cut(costs=costs).cost(rows) == 2 * (20 + 8 * 10 + 2 * 100)
    assert lengths(cut(600, costs=costs)(rows)) == [(20, 20)]
    assert lengths(cut(599, costs=costs)(rows)) == [(20,), (20,)]


@pytest.mark.parametrize("pack", [None, PACK], ids=["padded", "packed"])
def test_a_fixed_number_of_micro_batches_may_have_empty_ones(pack):
    assert lengths(cut(count=2, pack=pack)(ROWS)) == [(800, 100), (700, 300)]
    assert cut(1, count=2).fits(cut(1, count=2)(ROWS))  # cutting again would not change them
    three = cut(count=3, pack=pack)([sample(5)])
    assert lengths(three) == [(5,), (), ()]
    assert [len(batch.target_positions) for batch in three] == [1, 0, 0]


def test_dropped_rows_are_reported_once():
    dropped = Dropped("too long")
    first, second = cut(1)([sample(5), dropped, sample(4)])
    assert (first.dropped, second.dropped) == ((dropped,), ())
    (empty,) = cut()([dropped])
    assert (empty.lengths, empty.dropped) == ((), (dropped,))


@pytest.mark.parametrize("pack", [None, PACK], ids=["padded", "packed"])
def test_the_limit_is_halved_down_to_single_rows(pack):
    cutter = cut(pack=pack)
    sizes = []
    batches = cutter(ROWS)
    while True:
        assert cutter.fits(batches)
        sizes.append(max(len(batch.conversations) for batch in batches))
        if not cutter.halve(batches):
            break
        assert not cutter.fits(batches)
        batches = cutter(ROWS)
    assert (sizes[0], sizes[-1]) == (4, 1)
    assert cutter.fits(batches)


def lower(cutter: CutStep) -> None:
    cutter.halve(cutter(ROWS))


def test_data_workers_and_the_trainer_share_the_limit():
    cutter = cut()
    process = multiprocessing.get_context("fork").Process(target=lower, args=(cutter,))
    process.start()
    process.join()
    assert cutter.limit.largest == 800 * 4 / 2


def test_packed_rows_without_a_length_are_padded_to_whole_tiles():
    batch = PACK([sample(TILE), sample(1)])
    assert batch.input_ids.shape == (1, 2 * TILE)
    assert batch.segment_bounds.tolist() == [0, 64, 65, 128, 128, 128]
    assert PACK([]).input_ids.shape == (1, TILE)
    assert len(PACK([]).segment_bounds) == len(batch.segment_bounds)


@pytest.mark.parametrize(
    ("largest", "apart", "expected"),
    [
        (math.inf, False, ["12345"]),
        (2, False, ["12", "34", "5"]),
        (math.inf, True, ["1", "23", "4", "5"]),
        (1, True, ["1", "2", "3", "4", "5"]),
    ],
)
def test_rows_to_evaluate_stay_in_order_with_options_apart(largest, apart, expected):
    rows = []
    for number in range(1, 6):
        options = ("A", "B") if number in (2, 3, 5) else ()
        row = Conversation(id=str(number), turns=(), options=options)
        rows.append(replace(sample(number), conversation=row))
    reason = Dropped("a.jsonl:3: broken")
    pad = Pad(pad_id=0, collate_vision=concatenate_vision)
    collate = CutRows(pad=pad, limit=BatchLimit(largest), options_apart=apart)
    batches = collate([*rows[:2], reason, *rows[2:]])
    ids = ["".join(row.id for row in batch.conversations) for batch in batches]
    assert ids == expected
    assert [batch.dropped for batch in batches] == [(reason,), *[()] * (len(batches) - 1)]
    [empty] = collate([reason])
    assert (empty.conversations, empty.dropped) == ((), (reason,))


def test_data_workers_cut_rows_as_the_limit_is_lowered():
    limit = BatchLimit()
    pad = Pad(pad_id=0, collate_vision=concatenate_vision)
    collate = CutRows(pad=pad, limit=limit, options_apart=False)
    loader = DataLoader(ROWS * 20, batch_size=4, num_workers=1, collate_fn=collate)
    sizes = []
    for batches in loader:
        sizes.append(len(batches))
        limit.lower(1)
    assert (sizes[0], sizes[-1]) == (1, 4)
