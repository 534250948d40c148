import json
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import Conversation, DataError, Dropped, Length, Turn


def read(files: str, read_options) -> list[Conversation]:
    """Reads `abc` as a file of three rows, a, b and c, which ask with the prompt of the dataset."""
    turn = Turn(role="user", parts=(read_options.prompt or "what",))
    return [
        Conversation(id=letter, index=index, turns=(turn,)) for index, letter in enumerate(files)
    ]


def ids(rows) -> str:
    return "".join(row.id for row in rows)


def training_and_validation(**options) -> tuple[str, str]:
    opened = DatasetSpec(read=read, **options).open_training()
    return "".join(map(ids, opened.stages)), ids(opened.validation)


class Codes:
    """Measures a row as the character code of its id; x is dropped, y cannot be used."""

    settings: ClassVar = {}

    def __init__(self):
        self.measured = []

    def length(self, conversation):
        self.measured.append(conversation.id)
        if conversation.id == "x":
            raise Dropped("too long")
        if conversation.id == "y":
            raise DataError("broken")
        return Length(ord(conversation.id), 1, 0)


def test_a_number_after_a_file_takes_whole_passes_and_a_random_rest():
    training, _ = training_and_validation(train=["abcd#10", "xyz#2"])
    assert training[:8] == "abcdabcd"
    assert len(set(training[8:10])) == 2
    assert len(set(training[10:])) == 2
    assert training_and_validation(train=["abcd#10", "xyz#2"]) == (training, "")
    by_seed = {training_and_validation(train="abcdefgh#3", seed=seed) for seed in range(5)}
    assert len(by_seed) > 1


@pytest.mark.parametrize("files", ["abcdefgh#21", "abcdefgh", "abcdefgh#5"])
def test_no_row_is_in_both_splits_however_often_it_is_repeated(files):
    training, held_out = training_and_validation(train=files, validation=2)
    rows = int(files.partition("#")[2] or 8)
    assert len(held_out) == len(set(held_out)) == 2
    assert len(training) == rows - 2
    assert not set(training) & set(held_out)


@pytest.mark.parametrize(
    ("rows", "expected"), [(10, 10), (2, 2), (0.5, 2), (1.0, 4), (2.5, 10), (None, 4)]
)
def test_an_epoch_takes_a_number_or_a_multiple_of_the_rows(rows, expected):
    training, _ = training_and_validation(train=["ab", "cd"], rows=rows)
    assert len(training) == expected
    counts = Counter(training)
    assert max(counts.values()) - min(counts[letter] for letter in "abcd") <= 1


@pytest.mark.parametrize("rows", [0, 1, -3, 0.0, -0.5, True])
def test_an_ambiguous_or_empty_number_of_rows_is_refused(rows):
    with pytest.raises(DataError, match="a number of rows such as 2000, or how often"):
        DatasetSpec(read=read, train="abc", rows=rows)


def test_a_mixture_gives_each_dataset_its_own_prompt_split_and_tests(tmp_path):
    one = DatasetSpec(
        read=read,
        train="abcdefgh",
        validation=2,
        test="ij",
        prompt="one?",
        rows=12,
        split_file=tmp_path / "split_one.json",
    )
    two = DatasetSpec(
        read=read,
        train="klmn",
        validation="opq",
        test={"easy": "rs", "hard": "t"},
        prompt="two?",
        rows=0.5,
    )
    data = DataModule(processor=Codes(), datasets={"one": one, "two": two}, seed=3)
    data.setup("fit")
    counts = Counter(row.id for rows in data.train for row in rows)
    held_out = ids(data.validation)[:2]
    assert counts.total() == 12 + 2
    assert set(counts) & set("abcdefgh") == set("abcdefgh") - set(held_out)
    assert ids(data.validation)[2:] == "opq"
    prompts = {row.id: row.turns[0].parts[0] for rows in data.train for row in rows}
    assert {prompts[letter] for letter in counts if letter < "i"} == {"one?"}
    assert {prompts[letter] for letter in counts if letter > "i"} == {"two?"}
    data.setup("test")
    assert {name: ids(rows) for name, rows in data.test.items()} == {
        "one": "ij",
        "two_easy": "rs",
        "two_hard": "t",
    }
    data.setup("predict")
    assert {name: ids(rows) for name, rows in data.test.items()} == {"one": held_out, "two": "opq"}
    training, tests = data.sets()
    assert {name: "".join(sorted(ids(rows))) for name, rows in training.items()} == {
        "one_train": "".join(sorted(set("abcdefgh") - set(held_out))),
        "one_validation": held_out,
        "two_train": "".join(sorted(counts & Counter("klmn"))),
        "two_validation": "opq",
    }
    assert list(tests) == ["one", "two_easy", "two_hard"]


def test_a_remembered_split_is_used_whatever_the_amounts_and_the_seed(tmp_path):
    options = {"train": "abcdefgh#20", "split_file": tmp_path / "split.json"}
    _, held_out = training_and_validation(**options, validation=3)
    _, later = training_and_validation(**options, validation=0.5, seed=9, rows=4)
    assert later == held_out


def test_a_remembered_split_is_used_after_the_files_have_moved(tmp_path):
    lines = [json.dumps({"query": str(k), "response": "x"}) + "\n" for k in range(20)]
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("".join(lines))
    options = {"read": read_rows, "train": "rows.jsonl", "split_file": tmp_path / "split.json"}
    first = DatasetSpec(root=tmp_path / "here", validation=5, **options).open_training().validation
    moved = DatasetSpec(root=tmp_path / "there", validation=5, seed=7, **options).open_validation()
    assert ids(moved) == ids(first)
    with (tmp_path / "there" / "rows.jsonl").open("a") as file:
        file.write('{"query": "one more", "response": "x"}\n')
    message = r"split\.json: the split was made of 20 rows, the data has 21 now"
    with pytest.raises(DataError, match=message):
        DatasetSpec(root=tmp_path / "there", validation=5, **options).open_validation()


def test_paths_in_a_config_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    row = {"query": "<img>/elsewhere/a.png</img>x", "response": "y"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "images/a.png")
    dataset = DatasetSpec(
        read=read_rows,
        root="~",
        cache="~/cache",
        path_map={"/elsewhere": "~/images"},
        train="~/rows.jsonl",
        test={"one": "~/rows.jsonl"},
        validation=1,
        split_file="~/split.json",
    )
    opened = dataset.open_training()
    assert opened.validation[0].images[0].name == str(tmp_path / "images/a.png")
    assert len(dataset.open_tests()["one"]) == 2
    assert (tmp_path / "split.json").exists()
    assert (tmp_path / "cache/indexes").exists()


def test_each_row_is_measured_once_and_dropped_rows_are_left_out():
    dataset, processor = DatasetSpec(read=read, train=["abx#9", "cd"], validation="xe"), Codes()
    measured = dataset.measure(dataset.open_training(), processor, workers=1)
    assert sorted(processor.measured) == sorted("abxcdxe")
    assert {ids(rows) for rows in measured.stages} == {"ababab", "cd"}
    assert ids(measured.validation) == "e"
    lengths = np.concatenate(measured.lengths)
    assert "".join(map(chr, lengths)) == "abababcde"
    assert [finding.message for finding in measured.findings] == ["row 'x': too long"] * 2


def test_a_row_that_cannot_be_used_is_an_error_before_training():
    data = DataModule(processor=Codes(), read=read, train="abyc")
    with pytest.raises(DataError, match="1 of 4 rows cannot be used:\nrow 'y': broken"):
        data.setup("fit")


def test_dropping_every_row_is_an_error():
    data = DataModule(processor=Codes(), read=read, train="xx")
    with pytest.raises(DataError, match=r"no row is left to train on; findings\.jsonl"):
        data.setup("fit")


def test_lengths_are_cached_until_a_file_changes(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": "a", "query": "q"}\n{"id": "b", "query": "q"}\n')
    dataset = DatasetSpec(
        read=read_rows, root=tmp_path, train="rows.jsonl", cache=tmp_path / "cache"
    )
    for added, measured_rows in (("", "ab"), ("", ""), ('{"id": "c", "query": "q"}\n', "abc")):
        with file.open("a") as stream:
            stream.write(added)
        processor = Codes()
        measured = dataset.measure(dataset.open_training(), processor, workers=1)
        assert "".join(processor.measured) == measured_rows
        assert measured.lengths[0].tolist()[:2] == [ord("a"), ord("b")]


def test_a_row_that_is_selected_several_times_is_measured_once():
    dataset, processor = DatasetSpec(read=read, train=["abc#7"], rows=3), Codes()
    opened = dataset.open_training()
    measured = dataset.measure(opened, processor, workers=1)
    assert measured.lengths[0].tolist() == list(map(ord, ids(opened.stages[0])))
    assert len(processor.measured) == len(set(processor.measured))


def test_keys_of_a_single_dataset_are_refused_beside_datasets():
    with pytest.raises(ValueError, match=r"data\.root belongs to a single dataset"):
        DataModule(processor=Codes(), datasets={"one": DatasetSpec(read=read)}, root="x")


def test_a_dataset_says_whether_its_rows_may_name_private_hosts():
    assert not DatasetSpec(read=read).read_options.allow_private_hosts
    assert DatasetSpec(read=read, allow_private_hosts=True).read_options.allow_private_hosts
