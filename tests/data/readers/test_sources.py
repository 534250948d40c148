import json
import pickle

import pytest

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import FileRows, read_rows
from qwenvl_lit.data.selection import take
from qwenvl_lit.types import DataError


def test_rows_are_read_like_any_sequence_and_in_other_processes(folder):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"query": letter}) for letter in "abc"))
    rows = FileRows(folder / "rows.jsonl")
    assert [row.turns[0].parts[0] for row in rows] == list("abc")
    assert rows[-1] == rows[2]
    with pytest.raises(IndexError):
        rows[3]
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_git_lfs_pointer_is_named(name, tmp_path):
    file = tmp_path / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 123\n")
    with pytest.raises(DataError, match=rf"{name} cannot be read: it is a git-lfs pointer"):
        read_rows(str(file))


def test_a_glob_reads_its_files_in_the_order_of_their_names(folder):
    for name in "ba":
        (folder / f"{name}.jsonl").write_text(json.dumps({"query": name}))
    (folder / "[x].jsonl").write_text(json.dumps({"query": "x"}))
    assert [row.turns[0].parts[0] for row in read_rows("?.jsonl", ReadOptions(root=folder))] == [
        "a",
        "b",
    ]
    assert read_rows("[x].jsonl", ReadOptions(root=folder))[0].turns[0].parts == (
        "x",
    )  # a file of that very name
    with pytest.raises(DataError, match="no file"):
        read_rows("*.csv", ReadOptions(root=folder))
    with pytest.raises(DataError, match="check the path"):
        read_rows(str(folder / "none.jsonl"))
    with pytest.raises(DataError, match=r"is a folder, expected a file; check the path"):
        read_rows(str(folder))


def test_a_source_may_take_a_number_of_rows(folder):
    (folder / "rows.jsonl").write_text(
        "\n".join(json.dumps({"query": letter}) for letter in "abcdefgh")
    )

    def letters(source, **options):
        return "".join(
            row.turns[0].parts[0] for row in read_rows(source, ReadOptions(root=folder, **options))
        )

    assert letters("rows.jsonl#8") == "abcdefgh"
    assert letters("rows.jsonl#19")[:16] == "abcdefgh" * 2
    three = letters("rows.jsonl#3", seed=1)
    assert len(set(three)) == 3
    assert three == letters("rows.jsonl#3", seed=1) != letters("rows.jsonl#3", seed=2)


def test_take_of_nothing_is_nothing():
    assert list(take("abc", 0)) == []
