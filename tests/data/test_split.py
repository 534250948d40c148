import json

import pytest

from qwenvl_lit.data.split import Concat, Subset, hold_out
from qwenvl_lit.types import Conversation, DataError


def rows(*names: str) -> list[Conversation]:
    return [Conversation(id=name, turns=()) for name in names]


def ids(some) -> list[str]:
    return [row.id for row in some]


TEN = rows(*"abcdefghij")


def test_a_share_is_held_out_and_nothing_is_lost():
    [rest], held = hold_out([TEN], 0.3, seed=1, file=None)
    assert len(held) == 3
    assert sorted(ids(rest) + ids(held)) == list("abcdefghij")


def test_a_number_of_rows_is_drawn_over_all_sources():
    rest, held = hold_out([TEN[:4], TEN[4:]], 5, seed=0, file=None)
    assert len(held) == 5
    assert sorted([*ids(rest[0]), *ids(rest[1]), *ids(held)]) == list("abcdefghij")


def test_the_draw_follows_from_the_seed():
    assert ids(hold_out([TEN], 3, seed=7, file=None)[1]) == ids(
        hold_out([TEN], 3, seed=7, file=None)[1]
    )
    assert any(
        ids(hold_out([TEN], 3, seed=7, file=None)[1])
        != ids(hold_out([TEN], 3, seed=s, file=None)[1])
        for s in range(5)
    )


def test_a_split_is_drawn_once(tmp_path):
    file = tmp_path / "run" / "split.json"
    first = ids(hold_out([TEN], 3, seed=7, file=file)[1])
    assert ids(hold_out([TEN], 0.5, seed=8, file=file)[1]) == first
    assert list(json.loads(file.read_text())["validation"].values()) == first


def test_other_data_under_a_remembered_split_is_an_error(tmp_path):
    file = tmp_path / "split.json"
    held = ids(hold_out([TEN], 3, seed=7, file=file)[1])
    with pytest.raises(DataError, match="10 rows, the data has 9 now"):
        hold_out([TEN[:-1]], 3, seed=7, file=file)
    renamed = rows(*(name.replace(held[0], "new") for name in "abcdefghij"))
    with pytest.raises(DataError, match=f"was '{held[0]}' and is 'new' now"):
        hold_out([renamed], 3, seed=7, file=file)


@pytest.mark.parametrize("amount", [10, 11])
def test_something_must_be_left_to_train_on(amount):
    with pytest.raises(DataError, match="leave some to train on"):
        hold_out([TEN], amount, seed=0, file=None)


def test_sources_can_be_joined_and_chosen_from():
    joined = Concat([TEN[:2], [], TEN[5:7]])
    assert ids(joined) == ["a", "b", "f", "g"]
    assert ids(Subset(joined, [3, 0])) == ["g", "a"]
    with pytest.raises(IndexError):
        joined[4]
