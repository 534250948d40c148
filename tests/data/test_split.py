import json

import pytest

from qwenvl_lit.data.split import NothingToTrainOnError, hold_out
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
    with pytest.raises(NothingToTrainOnError, match=r"leave some .* or set data\.validation=null"):
        hold_out([TEN], amount, seed=0, file=None)


def test_a_share_of_few_rows_is_a_warning_when_it_is_drawn(tmp_path, caplog):
    many = rows(*map(str, range(56)))
    hold_out([many], 0.01, seed=0, file=tmp_path / "split.json")
    [warning] = caplog.messages
    assert "data.validation=0.01 holds out 1 of 56 rows, too few" in warning
    assert "; data.validation=11 holds out a fifth" in warning
    caplog.clear()
    hold_out([many], 0.01, seed=0, file=tmp_path / "split.json")
    hold_out([many], 3, seed=0, file=None)  # a number that was chosen
    hold_out([many], 0.2, seed=0, file=None)
    assert not caplog.messages


@pytest.fixture
def written(tmp_path):
    """A split file, and the ids of the rows that it holds out."""
    file = tmp_path / "split.json"
    held = ids(hold_out([TEN], 4, seed=7, file=file)[1])
    return file, held


def test_a_truncated_split_file_is_restored_if_its_rows_are_those_of_the_seed(written, caplog):
    file, held = written
    sound = file.read_text()
    file.write_text(sound[:-9])
    assert ids(hold_out([TEN], 4, seed=7, file=file)[1]) == held
    assert file.read_text() == sound
    assert (file.parent / "split.json.broken").read_text() == sound[:-9]
    [warning] = caplog.records
    assert "split.json cannot be read: it is not JSON" in warning.getMessage()
    assert "the damaged file is now split.json.broken" in warning.getMessage()


def test_a_damaged_split_file_of_another_seed_is_refused_and_kept(written):
    file, _ = written
    file.write_text(file.read_text()[:-9])
    content = file.read_text()
    message = (
        r"split\.json cannot be read.*restore it from a copy, or.*data\.validation=4 and seed=8"
    )
    with pytest.raises(DataError, match=message):
        hold_out([TEN], 4, seed=8, file=file)
    assert file.read_text() == content
    assert [path.name for path in file.parent.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "\x00" * 40,
        '{"rows": 10}',
        '{"rows": 10, "validation": {"x": "a"}}',
        '{"rows": 10, "validation": {"10": "a"}}',
    ],
)
def test_a_split_file_without_legible_rows_is_refused_in_one_line(written, content):
    file, _ = written
    file.write_text(content)
    with pytest.raises(
        DataError, match=r"split\.json cannot be read.*must stay the same"
    ) as refused:
        hold_out([TEN], 4, seed=7, file=file)
    assert "\n" not in str(refused.value)


def test_a_split_file_that_is_not_utf_8_is_restored(written):
    file, held = written
    file.write_bytes(b"\xff" + file.read_bytes())
    assert ids(hold_out([TEN], 4, seed=7, file=file)[1]) == held
