import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from toy_task import trainer

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.data.selection import Concat
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import (
    Batch,
    Conversation,
    DataError,
    Dropped,
    ImageSource,
    Length,
    Sample,
    Turn,
    micro_batches_of,
)


class Letters:
    """Encodes a conversation as its index plus one and a 9 per letter; a prompt without letters."""

    pad_id = 0
    supports_packing = True
    settings: ClassVar = {}
    collate_vision = staticmethod(concatenate_vision)

    def length(self, conversation):
        return Length(len(conversation.id) + 1, len(conversation.id), 0)

    def encode(self, conversation, *, prompt=False):
        letters = 0 if prompt else len(conversation.id)
        input_ids = torch.tensor([conversation.index + 1] + [9] * letters)
        labels = torch.where(input_ids == 9, input_ids, -100)
        return Sample(
            conversation=conversation,
            input_ids=input_ids,
            labels=labels,
            vision_positions=torch.tensor([]),
            vision={},
        )


def read(source: str, read_options) -> list[Conversation]:
    """Reads `abc` as three rows, a, b and c."""
    return [
        Conversation(id=letter, index=index, turns=(Turn(role="user", parts=(letter,)),))
        for index, letter in enumerate(source)
    ]


def data_of_letters(**options) -> DataModule:
    return DataModule(processor=Letters(), read=read, **options)


def rows_of(loader) -> list[Conversation]:
    batches = (batch for loaded in loader for batch in micro_batches_of(loaded))
    return [row for batch in batches for row in batch.conversations]


def ids(loader) -> list[str]:
    return [row.id for row in rows_of(loader)]


def findings(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "findings.jsonl").read_bytes().split(b"\n")[:-1]]


def test_an_epoch_has_every_row_once():
    data = data_of_letters(train=["abcd", "efg"], batch_size=2)
    data.setup("fit")
    order = ids(data.train_dataloader())
    assert sorted(order) == list("abcdefg")
    assert order != list("abcdefg")


def test_staged_sources_follow_each_other():
    data = data_of_letters(train=["abcdefgh", "ijklmnop"], order="staged", batch_size=4)
    data.setup("fit")
    order = ids(data.train_dataloader())
    assert sorted(order[:8]) == list("abcdefgh")
    assert order[:8] != list("abcdefgh")
    assert sorted(order[8:]) == list("ijklmnop")


def test_validation_has_every_row_for_the_loss_and_some_prompts_to_answer():
    data = data_of_letters(
        train="abc", validation="vwxyz", eval_batch_size=2, generated_validation_rows=3
    )
    data.setup("fit")
    with_answers, prompts = data.val_dataloader()
    assert ids(with_answers) == list("vwxyz")
    assert len(set(ids(prompts)) & set("vwxyz")) == 3
    assert next(iter(with_answers))[0].input_ids.tolist() == [[1, 9], [2, 9]]
    assert next(iter(prompts))[0].input_ids.shape == (2, 1)


def test_held_out_rows_are_the_validation_rows_of_every_stage(tmp_path):
    options = {"train": "abcdefgh", "validation": 2, "split_file": str(tmp_path / "split.json")}
    trained = data_of_letters(**options)
    trained.setup("fit")
    held = ids(trained.val_dataloader()[0])
    assert sorted(held + ids(trained.train_dataloader())) == list("abcdefgh")
    for stage in ("predict", "test"):
        later = data_of_letters(**options, seed=99)
        later.setup(stage)
        assert later.test_names == ["validation"]
        assert [ids(loader) for loader in later.test_dataloader()] == [held]


def test_test_uses_the_test_sets_and_predict_the_validation_rows():
    data = data_of_letters(validation="vw", test={"easy": "ab", "hard": "cde"})
    data.setup("test")
    assert dict(zip(data.test_names, map(ids, data.test_dataloader()), strict=True)) == {
        "easy": ["a", "b"],
        "hard": ["c", "d", "e"],
    }
    data.setup("predict")
    assert data.test_names == ["validation"]
    assert ids(data.predict_dataloader()[0]) == ["v", "w"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("fit", "nothing to train on"),
        (TrainerFn.TESTING, "no rows to score"),
        (TrainerFn.PREDICTING, "no rows to answer"),
    ],
)
def test_the_error_about_missing_rows_names_the_keys_to_set(stage, message):
    with pytest.raises(DataError, match=f"{message}.*data\\."):
        data_of_letters().setup(stage)


def test_files_are_prepared_before_they_are_read():
    prepared = []
    data_of_letters(
        root="folder", download=False, prepare=lambda *given: prepared.append(given)
    ).prepare_data()
    assert prepared == [(Path("folder"), False)]


class OpensImages(Letters):
    """Opens the images of a row, as a real processor does."""

    def encode(self, conversation, *, prompt=False):
        for image in conversation.images:
            image.open()
        return super().encode(conversation, prompt=prompt)


@pytest.fixture
def files(tmp_path):
    """Makes twenty rows about images; the image of the third cannot be decoded."""
    with (tmp_path / "rows.jsonl").open("w") as stream:
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
            row = {"id": str(number), "query": f"<img>{number}.png</img>", "response": "x"}
            stream.write(json.dumps(row) + "\n")
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return tmp_path


def test_a_broken_image_is_an_error(files):
    data = DataModule(processor=OpensImages(), read=read_rows, root=files, train="rows.jsonl")
    data.setup("fit")
    with pytest.raises(DataError, match=r"2\.png cannot be read as an image"):
        list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_with_a_broken_image_may_be_dropped_and_is_listed(files, workers, caplog):
    data = DataModule(
        processor=OpensImages(),
        read=read_rows,
        root=files,
        train="rows.jsonl",
        on_bad_image="drop",
        max_bad_fraction=0.05,
        batch_size=4,
        num_workers=workers,
    )
    data.trainer = trainer(files / "run")
    data.trainer.training = True
    data.setup("fit")
    seen = []
    for _ in range(2):
        for batch in data.train_dataloader():
            batch = data.on_before_batch_transfer(batch, 0)
            seen += [row.id for row in batch.conversations]
    assert sorted(seen) == sorted([str(number) for number in range(20) if number != 2] * 2)
    [finding] = findings(files / "run")
    assert finding["set"] == "train"
    assert finding["kind"] == "dropped"
    assert "2.png cannot be read as an image" in finding["message"]
    assert caplog.text.count("is left out") == 1


def test_too_many_dropped_rows_stop_the_run(files):
    (files / "7.png").write_bytes(b"")
    data = DataModule(
        processor=OpensImages(),
        read=read_rows,
        root=files,
        train="rows.jsonl",
        on_bad_image="drop",
        max_bad_fraction=0.05,
    )
    data.trainer = trainer(files / "run")
    data.trainer.training = True
    data.setup("fit")
    message = (
        r"train: 2 of 20 rows had to be left out, "
        r"more than data\.max_bad_fraction=0\.05 allows"
    )
    with pytest.raises(DataError, match=message):
        [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]


@pytest.mark.parametrize(("missing", "too_many"), [(1, False), (2, True)])
def test_rows_with_missing_images_may_be_dropped_before_training(files, missing, too_many):
    options = {
        "processor": OpensImages(),
        "read": read_rows,
        "root": files,
        "train": "rows.jsonl#10",
        "max_bad_fraction": 0.1,
    }
    [rows] = DataModule(**options).datasets[""].open_training().stages
    for row in list(rows)[:missing]:
        (files / f"{row.id}.png").unlink()
    with pytest.raises(DataError, match=rf"{missing} of 10 rows cannot be used"):
        DataModule(**options).setup("fit")
    data = DataModule(**options, on_bad_image="drop")
    data.trainer = trainer(files / "run")
    message = "data: an image of 2 of 10 rows cannot be opened"
    with pytest.raises(DataError, match=message) if too_many else nullcontext():
        data.setup("fit")
    assert [finding["kind"] for finding in findings(files / "run")] == ["dropped"] * missing
    assert too_many or len(Concat(data.train)) == 9


def test_only_rows_with_broken_images_are_dropped(files):
    class Refuses(Letters):
        def encode(self, conversation, *, prompt=False):
            raise DataError("no answer to learn from")

    data = DataModule(
        processor=Refuses(), read=read_rows, root=files, train="rows.jsonl#2", on_bad_image="drop"
    )
    data.setup("fit")
    with pytest.raises(DataError, match="no answer to learn from"):
        list(data.train_dataloader())


def test_rows_that_are_left_out_or_repaired_are_listed_before_training(tmp_path, caplog):
    class Long(Letters):
        def length(self, conversation):
            if conversation.id == "c":
                raise Dropped("too long")
            return super().length(conversation)

    def read_with_note(source, read_options):
        first, *others = read(source, read_options)
        return [dataclasses.replace(first, where="rows:1", notes=("box clipped",)), *others]

    data = DataModule(processor=Long(), read=read_with_note, train="abcd")
    data.trainer = trainer(tmp_path)
    data.setup("fit")
    assert sorted(ids(data.train_dataloader())) == list("abd")
    assert findings(tmp_path) == [
        {
            "set": "data",
            "kind": "note",
            "file": "rows",
            "line": 1,
            "row": None,
            "id": "a",
            "message": "rows:1: row 'a': box clipped",
        },
        {
            "set": "data",
            "kind": "dropped",
            "file": None,
            "line": None,
            "row": None,
            "id": "c",
            "message": "row 'c': too long",
        },
    ]
    assert "data: 1 row left out, 1 repaired or kept" in caplog.text
    with (tmp_path / "findings.jsonl").open("a") as file:
        file.write('{"set": "da\n')  # of a process that was killed
    resumed = DataModule(processor=Long(), read=read_with_note, train="abcd")
    resumed.trainer = trainer(tmp_path)
    resumed.setup("fit")
    assert len((tmp_path / "findings.jsonl").read_text().splitlines()) == 3


def test_images_of_more_than_8_bits_are_counted_once_before_training(tmp_path, caplog):
    Image.new("I;16", (4, 4), 3000).save(tmp_path / "deep.png")
    Image.new("L", (4, 4), 30).save(tmp_path / "plain.png")

    def read_with_images(source, read_options):
        rows = []
        for row, name in zip(read(source, read_options), ("deep", "deep", "plain"), strict=True):
            image = ImageSource(tmp_path / f"{name}.png", read_options.image_options)
            question = Turn(role="user", parts=(image, row.id))
            rows.append(dataclasses.replace(row, turns=(question,)))
        return rows

    options = {"processor": Letters(), "read": read_with_images, "train": "abc"}
    data = DataModule(**options)
    data.trainer = trainer(tmp_path)
    data.setup("fit")
    [finding] = findings(tmp_path)
    assert (finding["kind"], finding["id"]) == ("image", "a")
    assert "data: 1 image with values of more than 8 bits" in caplog.text
    assert "data.on_deep_image=scale" in caplog.text
    caplog.clear()
    DataModule(**options, on_deep_image="scale").setup("fit")
    assert caplog.text == ""


def test_predictions_are_numbered_over_all_files_of_a_set():
    data = data_of_letters(test={"both": ["abc", "de"]}, eval_batch_size=2)
    data.setup("test")
    rows = rows_of(data.test_dataloader()[0])
    assert [(row.id, row.index) for row in rows] == list(zip("abcde", range(5), strict=True))


def test_max_tokens_limits_padded_and_packed_batches():
    class Words(Letters):
        def length(self, conversation):
            return Length(len(conversation.id) * 3 + 1, 1, 0)

        def encode(self, conversation, *, prompt=False):
            sample = super().encode(conversation)
            tokens = torch.ones(self.length(conversation).tokens, dtype=torch.int64)
            return dataclasses.replace(sample, input_ids=tokens, labels=tokens)

    def batches(packing: bool) -> list[Batch]:
        options = {"processor": Words(), "read": read, "train": "abcdefgh", "max_tokens": 13}
        data = DataModule(**options, packing=packing)
        data.setup("fit")
        return sorted(data.train_dataloader(), key=lambda batch: batch.lengths)

    padded, packed = batches(packing=False), batches(packing=True)
    assert [batch.input_ids.shape for batch in padded] == [(2, 4), (3, 4), (3, 4)]
    assert [batch.input_ids.shape for batch in packed] == [(1, 13), (1, 13), (1, 13)]
    assert [batch.lengths for batch in packed] == [(4, 4), (4, 4, 4), (4, 4, 4)]
    assert packed[0].segment_bounds.tolist() == [0, 4, 8, 12, 13, 13, 13, 13]
    assert {(len(batch.segment_bounds), batch.longest_segment) for batch in packed} == {(8, 4)}


def test_the_error_about_a_row_above_max_tokens_names_it_and_a_remedy():
    data = data_of_letters(train="abc", max_tokens=1)
    data.setup("fit")
    data.trainer = trainer(None)
    message = (
        r"row 'a' has 2 tokens, more than data\.max_tokens=1; "
        r"raise it, or leave .* model\.max_length=1"
    )
    for method in (data.train_dataloader, data.steps_of_run):
        with pytest.raises(DataError, match=message):
            method()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("order", "random", "one of mixed, staged"),
        ("on_bad_image", "ignore", "one of error, drop"),
        ("packing", "maybe", "true or false"),
        ("group_by_length", 1, "true or false"),
        ("max_tokens", "many", "a whole number, 1 or more, at most 100000000, or null"),
        ("max_tokens", 0, "a whole number, 1 or more, at most 100000000, or null"),
        ("batch_size", 0, "a whole number, 1 or more, at most 1000000, or auto"),
        ("eval_batch_size", 2.0, "a whole number, 1 or more, at most 1000000, or auto"),
    ],
)
def test_the_error_about_a_wrong_value_says_what_is_allowed(name, value, allowed):
    message = f"data.{name} must be {allowed}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data_of_letters(**{name: value})


def test_packing_is_refused_for_a_family_that_does_not_support_it():
    class OtherProcessor(Letters):
        supports_packing = False

    options = {"processor": OtherProcessor(), "read": read, "max_tokens": 8}
    DataModule(**options, packing=False)
    with pytest.raises(ValueError, match=r"data\.packing=true: .* family Other cannot train on"):
        DataModule(**options, packing=True)


def test_prediction_leaves_out_answered_rows():
    answered = {"test": {0: "a", 2: "c"}}
    data = data_of_letters(test="abcd", answered=answered)
    data.setup("predict")
    assert ids(data.predict_dataloader()[0]) == ["b", "d"]
    assert ids(data.test_dataloader()[0]) == ["a", "b", "c", "d"]


def test_a_processor_may_read_the_sizes_of_images_to_measure_rows(tmp_path):
    class Sized(Letters):
        """An image has a token for each pixel of its width."""

        def length(self, conversation):
            tokens = sum(image.size[0] for image in conversation.images)
            return Length(tokens + 2, 1, tokens)

    def read_images(source, read_options):
        rows = []
        for index, name in enumerate(source.split()):
            Image.new("RGB", (index + 3, 5)).save(tmp_path / f"{index}.png")
            turn = Turn(role="user", parts=(ImageSource(tmp_path / name), "?"))
            rows.append(Conversation(id=name, index=index, turns=(turn,), where=f"rows:{index}"))
        return rows

    def opened(**options) -> DataModule:
        data = DataModule(processor=Sized(), read=read_images, **options)
        data.setup("fit")
        return data

    data = opened(train="0.png 1.png", validation="1.png")
    assert data.sizes.tolist() == [[5, 6], [1, 1], [3, 4]]
    with pytest.raises(DataError, match=r"(?s)1 of 2 rows.*rows:1: row 'none.png': image .*exist"):
        opened(train="0.png none.png")
    data = opened(train="0.png none.png", on_bad_image="drop", max_bad_fraction=0.5)
    assert data.sizes.tolist() == [[5], [1], [3]]
