import numpy as np
import pytest

from qwenvl_lit.data.selection import Concat, Subset, first_of_each, flatten, parse_count, take


def test_subsets_and_concatenations_select_rows():
    joined = Concat(["ab", [], "fg"])
    assert list(joined) == ["a", "b", "f", "g"]
    assert list(Subset(joined, [3, 0])) == ["g", "a"]
    with pytest.raises(IndexError):
        joined[4]


def test_a_count_after_a_file_is_parsed():
    assert parse_count("rows.jsonl#2000") == ("rows.jsonl", 2000)
    assert parse_count("rows.jsonl") == ("rows.jsonl", None)
    assert parse_count("odd#name.jsonl") == ("odd#name.jsonl", None)
    assert parse_count("odd#name.jsonl#3") == ("odd#name.jsonl", 3)


def test_take_repeats_whole_passes_and_draws_the_rest():
    assert "".join(take("abc", 6)) == "abcabc"
    taken = "".join(take("abc", 5))
    assert taken.startswith("abc")
    assert len(set(taken[3:])) == 2
    assert len(take("abc", 0)) == len(take("", 5)) == 0


def test_the_first_rows_of_each_source_are_taken_in_turn():
    assert first_of_each([5], 3) == [0, 1, 2]
    assert first_of_each([3, 0, 1, 5], 6) == [0, 1, 2, 3, 4, 5]
    assert first_of_each([3, 0, 1, 5], 100) == list(range(9))
    assert first_of_each([], 4) == first_of_each([0], 4) == first_of_each([4], 0) == []


def test_flatten_finds_the_index_of_each_row_in_its_source():
    sources, indices = flatten(Concat([Subset("abc", [2, 2]), "de"]))
    assert sources == ["abc", "de"]
    assert indices.tolist() == [2, 2, 3, 4]


def test_flatten_lists_a_source_once():
    letters, others = list("abc"), list("de")
    inner = Concat([others, letters])
    rows = Concat([letters, Subset(inner, [4, 0]), Concat([]), Subset(letters, np.array([1]))])
    sources, indices = flatten(rows)
    assert sources == [letters, others]
    assert [Concat(sources)[index] for index in indices] == list(rows)
    assert indices.tolist() == [0, 1, 2, 2, 3, 1]
