import json
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import Conversation, DataError, Dropped, Turn


def read(files: str, read_options) -> list[Conversation]:
    """`abc` is a file of three rows, a, b and c, which ask by the dataset's prompt."""
    asked = (read_options.prompt or "what",)
    return [
        Conversation(id=letter, index=place, turns=(Turn(role="user", parts=asked),))
        for place, letter in enumerate(files)
    ]


def ids(rows) -> str:
    return "".join(row.id for row in rows)


def trained(**options) -> tuple[str, str]:
    """The rows to learn from and those held out."""
    opened = DatasetSpec(read=read, **options).open_training()
    return "".join(map(ids, opened.stages)), ids(opened.validation)


class Count:
    """One token a letter of the id and one more; x is dropped, y cannot be used."""

    settings: ClassVar = {}

    def __init__(self):
        self.counted = []

    def length(self, conversation):
        self.counted.append(conversation.id)
        if conversation.id == "x":
            raise Dropped("f:1: x is too long")
        if conversation.id == "y":
            raise DataError("f:2: y is broken")
        return ord(conversation.id), 1


def test_a_number_behind_a_file_takes_whole_passes_and_a_random_rest():
    learned, _ = trained(train=["abcd#10", "xyz#2"])
    assert learned[:8] == "abcdabcd"
    assert len(set(learned[8:10])) == 2
    assert len(set(learned[10:])) == 2
    assert trained(train=["abcd#10", "xyz#2"]) == (learned, "")
    assert any(
        trained(train="abcdefgh#3", seed=seed) != trained(train="abcdefgh#3") for seed in range(5)
    )


@pytest.mark.parametrize("files", ["abcdefgh#21", "abcdefgh", "abcdefgh#5"])
def test_no_row_is_on_both_sides_of_a_split_however_often_it_is_repeated(files):
    learned, held = trained(train=files, validation=2)
    wanted = int(files.partition("#")[2] or 8)
    assert len(held) == len(set(held)) == 2
    assert len(learned) == wanted - 2
    assert not set(learned) & set(held)


@pytest.mark.parametrize(
    ("rows", "expected"), [(10, 10), (2, 2), (0.5, 2), (1.0, 4), (2.5, 10), (None, 4)]
)
def test_a_dataset_gives_so_many_rows_or_its_share(rows, expected):
    learned, _ = trained(train=["ab", "cd"], rows=rows)
    assert len(learned) == expected
    counts = Counter(learned)
    assert max(counts.values()) - min(counts[letter] for letter in "abcd") <= 1


@pytest.mark.parametrize("rows", [0, 1, -3, 0.0, -0.5, True])
def test_an_amount_that_may_mean_two_things_is_refused(rows):
    with pytest.raises(DataError, match="a number of rows such as 2000, or how often"):
        DatasetSpec(read=read, train="abc", rows=rows)


def test_a_mixture_gives_each_dataset_its_own_prompt_split_and_tests(tmp_path):
    options = {"split_file": tmp_path / "split_one.json"}
    one = DatasetSpec(
        read=read, train="abcdefgh", validation=2, test="ij", prompt="one?", rows=12, **options
    )
    two = DatasetSpec(
        read=read,
        train="klmn",
        validation="opq",
        test={"easy": "rs", "hard": "t"},
        prompt="two?",
        rows=0.5,
    )
    data = DataModule(processor=Count(), datasets={"one": one, "two": two}, seed=3)
    data.setup("fit")
    counts = Counter(row.id for rows in data.train for row in rows)
    held = ids(data.validation)[:2]
    assert counts.total() == 12 + 2
    assert set(counts) & set("abcdefgh") == set("abcdefgh") - set(held)
    assert ids(data.validation)[2:] == "opq"
    asked = {row.id: row.turns[0].parts[0] for rows in data.train for row in rows}
    assert {asked[letter] for letter in counts if letter < "i"} == {"one?"}
    assert {asked[letter] for letter in counts if letter > "i"} == {"two?"}
    data.setup("test")
    assert {name: ids(rows) for name, rows in data.test.items()} == {
        "one": "ij",
        "two_easy": "rs",
        "two_hard": "t",
    }
    data.setup("predict")
    assert {name: ids(rows) for name, rows in data.test.items()} == {"one": held, "two": "opq"}
    learned, tests = data.sets()
    assert {name: "".join(sorted(ids(rows))) for name, rows in learned.items()} == {
        "one_train": "".join(sorted(set("abcdefgh") - set(held))),
        "one_validation": held,
        "two_train": "".join(sorted(counts & Counter("klmn"))),
        "two_validation": "opq",
    }
    assert list(tests) == ["one", "two_easy", "two_hard"]


def test_a_split_is_never_drawn_again_also_for_other_amounts(tmp_path):
    options = {"train": "abcdefgh#20", "split_file": tmp_path / "split.json"}
    _, held = trained(**options, validation=3)
    assert trained(**options, validation=0.5, seed=9, rows=4)[1] == held


def test_a_split_holds_where_the_files_have_moved(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.jsonl").write_text(
            "".join(json.dumps({"query": str(k), "response": "x"}) + "\n" for k in range(20))
        )
    options = {"read": read_rows, "train": "rows.jsonl", "split_file": tmp_path / "split.json"}
    first = DatasetSpec(root=tmp_path / "here", validation=5, **options).open_training().validation
    moved = DatasetSpec(root=tmp_path / "there", validation=5, seed=7, **options).open_validation()
    assert ids(moved) == ids(first)
    with (tmp_path / "there" / "rows.jsonl").open("a") as file:
        file.write('{"query": "one more", "response": "x"}\n')
    with pytest.raises(
        DataError, match=r"split\.json: the split was made over 20 rows, the data has 21 now"
    ):
        DatasetSpec(root=tmp_path / "there", validation=5, **options).open_validation()


def test_each_row_is_measured_once_and_dropped_ones_are_left_out():
    source, processor = DatasetSpec(read=read, train=["abx#9", "cd"], validation="xe"), Count()
    measured = source.measured(source.open_training(), processor, workers=1)
    assert sorted(processor.counted) == sorted("abxcdxe")
    assert {ids(rows) for rows in measured.stages} == {"ababab", "cd"}
    assert ids(measured.validation) == "e"
    lengths = "".join(chr(length) for some in measured.lengths for length in some)
    assert lengths == "abababcde"
    assert [finding.message for finding in measured.findings] == ["f:1: x is too long"] * 2


def test_a_row_that_cannot_be_used_stops_before_training():
    data = DataModule(processor=Count(), read=read, train="abyc")
    with pytest.raises(DataError, match="1 of 4 rows cannot be used:\nf:2: y is broken"):
        data.setup("fit")


def test_nothing_left_is_an_error():
    data = DataModule(processor=Count(), read=read, train="xx")
    with pytest.raises(DataError, match=r"no row is left to train on; findings\.jsonl"):
        data.setup("fit")


def test_lengths_are_cached_until_a_file_changes(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": "a", "query": "q"}\n{"id": "b", "query": "q"}\n')
    source = DatasetSpec(
        read=read_rows, root=tmp_path, train="rows.jsonl", cache=tmp_path / "cache"
    )
    for text, counted in (("", "ab"), ("", ""), ('{"id": "c", "query": "q"}\n', "abc")):
        with file.open("a") as stream:
            stream.write(text)
        processor = Count()
        measured = source.measured(source.open_training(), processor, workers=1)
        assert "".join(processor.counted) == counted
        assert measured.lengths[0].tolist()[:2] == [ord("a"), ord("b")]


def test_one_file_under_two_names_is_measured_as_one():
    source, processor = DatasetSpec(read=read, train=["abc#7"], rows=3), Count()
    opened = source.open_training()
    assert np.array_equal(
        source.measured(opened, processor, workers=1).lengths[0],
        [ord(letter) for letter in ids(opened.stages[0])],
    )
    assert len(processor.counted) == len(set(processor.counted))


def test_keys_of_one_dataset_are_refused_beside_several():
    with pytest.raises(ValueError, match=r"data\.root belongs to a single dataset"):
        DataModule(processor=Count(), datasets={"one": DatasetSpec(read=read)}, root="x")
