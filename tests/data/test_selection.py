import numpy as np
import pytest

from qwenvl_lit.data.selection import Concat, Subset, flatten, parse_count, spread, take


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


def test_rows_are_spread_over_sets_files_and_sections():
    a, b, c = list(range(30)), list(range(3)), list(range(100, 130))
    two_files = Subset(Concat([a, b]), range(2, 33))
    chosen = spread([two_files, c], 8)
    assert chosen == sorted(set(chosen)) == spread([two_files, c], 8)
    joined = Concat([two_files, c])
    assert [index >= len(two_files) for index in chosen] == [False] * 4 + [True] * 4
    assert [index >= 28 for index in chosen[:4]] == [False, False, True, True]  # of the second file
    sections = [range(100, 107), range(107, 115), range(115, 122), range(122, 130)]
    for index, section in zip(chosen[4:], sections, strict=True):
        assert joined[index] in section


def test_spread_takes_all_rows_if_there_are_too_few():
    assert spread(["abc", "", "d", "efghi"], 100) == list(range(9))
    assert len(spread(["abc", "", "d", "efghi"], 6)) == 6
    assert spread([], 4) == spread([""], 4) == spread(["abcd"], 0) == []
    assert len(spread([[n] for n in range(1000)], 4)) == 4


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
