import json

import pytest

from qwenvl_lit.data.split import hold_out
from qwenvl_lit.types import Conversation, DataError


def rows(*names: str) -> list[Conversation]:
    return [Conversation(id=name, turns=()) for name in names]


def ids(selected) -> list[str]:
    return [row.id for row in selected]


TEN = rows(*"abcdefghij")


def test_a_share_is_held_out_and_no_row_is_lost():
    [rest], held = hold_out([TEN], 0.3, seed=1, file=None)
    assert len(held) == 3
    assert sorted(ids(rest) + ids(held)) == list("abcdefghij")


def test_a_number_of_rows_is_drawn_over_all_sources():
    rest, held = hold_out([TEN[:4], TEN[4:]], 5, seed=0, file=None)
    assert len(held) == 5
    assert sorted([*ids(rest[0]), *ids(rest[1]), *ids(held)]) == list("abcdefghij")


def test_the_seed_determines_the_held_out_rows():
    def held_out(seed: int) -> list[str]:
        return ids(hold_out([TEN], 3, seed=seed, file=None)[1])

    assert held_out(7) == held_out(7)
    assert any(held_out(seed) != held_out(7) for seed in range(5))


def test_a_split_file_is_used_by_later_runs(tmp_path):
    file = tmp_path / "run" / "split.json"
    first = ids(hold_out([TEN], 3, seed=7, file=file)[1])
    assert ids(hold_out([TEN], 0.5, seed=8, file=file)[1]) == first
    assert list(json.loads(file.read_text())["validation"].values()) == first


def test_a_split_file_of_other_data_is_an_error(tmp_path):
    file = tmp_path / "split.json"
    held = ids(hold_out([TEN], 3, seed=7, file=file)[1])
    with pytest.raises(DataError, match="10 rows, the data has 9 now"):
        hold_out([TEN[:-1]], 3, seed=7, file=file)
    renamed = rows(*(name.replace(held[0], "new") for name in "abcdefghij"))
    with pytest.raises(DataError, match=f"was '{held[0]}' and is 'new' now"):
        hold_out([renamed], 3, seed=7, file=file)


@pytest.mark.parametrize("amount", [10, 11])
def test_holding_out_every_row_is_an_error(amount):
    with pytest.raises(DataError, match="leave some to train on"):
        hold_out([TEN], amount, seed=0, file=None)
