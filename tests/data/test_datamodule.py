import dataclasses
import json
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
from qwenvl_lit.data.split import Concat
from qwenvl_lit.types import Conversation, DataError, Dropped, Turn


class Letters:
    """Encodes a conversation as its number and its letters, or as the number alone."""

    pad_id = 0
    settings: ClassVar = {}

    def length(self, conversation):
        return len(conversation.id) + 1, len(conversation.id)

    def encode(self, conversation, *, prompt=False):
        from qwenvl_lit.types import Sample

        ids = torch.tensor(
            [conversation.index + 1] + ([] if prompt else [9] * len(conversation.id))
        )
        labels = torch.where(ids == 9, ids, -100)
        return Sample(
            conversation=conversation,
            input_ids=ids,
            labels=labels,
            vision_positions=torch.tensor([]),
            vision={},
        )


def read(source: str, read_options) -> list[Conversation]:
    """`abc` is a source of three rows, a, b and c."""
    return [
        Conversation(id=letter, index=place, turns=(Turn(role="user", parts=(letter,)),))
        for place, letter in enumerate(source)
    ]


def module(**options) -> DataModule:
    return DataModule(processor=Letters(), read=read, **options)


def ids(loader) -> list[str]:
    return [conversation.id for batch in loader for conversation in batch.conversations]


def test_an_epoch_has_every_row_once():
    data = module(train=["abcd", "efg"], batch_size=2)
    data.setup("fit")
    order = ids(data.train_dataloader())
    assert sorted(order) == list("abcdefg")
    assert order != list("abcdefg")


def test_staged_sources_come_one_after_the_other():
    data = module(train=["abcdefgh", "ijklmnop"], order="staged", batch_size=4)
    data.setup("fit")
    order = ids(data.train_dataloader())
    assert sorted(order[:8]) == list("abcdefgh")
    assert order[:8] != list("abcdefgh")
    assert sorted(order[8:]) == list("ijklmnop")


def test_validation_gives_every_row_for_the_loss_and_some_prompts_to_answer():
    data = module(train="abc", validation="vwxyz", eval_batch_size=2, generated_validation_rows=3)
    data.setup("fit")
    with_answers, prompts = data.val_dataloader()
    assert ids(with_answers) == list("vwxyz")
    assert ids(prompts) == list("vwx")
    assert next(iter(with_answers)).input_ids.tolist() == [[1, 9], [2, 9]]
    assert next(iter(prompts)).input_ids.tolist() == [[1], [2]]


def test_held_out_rows_are_the_validation_rows_of_every_stage(tmp_path):
    options = {"train": "abcdefgh", "validation": 2, "split_file": str(tmp_path / "split.json")}
    trained = module(**options)
    trained.setup("fit")
    held = ids(trained.val_dataloader()[0])
    assert sorted(held + ids(trained.train_dataloader())) == list("abcdefgh")
    for stage in ("predict", "test"):
        later = module(**options, seed=99)
        later.setup(stage)
        assert later.test_names == ["validation"]
        assert [ids(loader) for loader in later.test_dataloader()] == [held]


def test_test_prefers_test_sets_and_predict_the_validation_rows():
    data = module(validation="vw", test={"easy": "ab", "hard": "cde"})
    data.setup("test")
    assert dict(zip(data.test_names, map(ids, data.test_dataloader()), strict=True)) == {
        "easy": ["a", "b"],
        "hard": ["c", "d", "e"],
    }
    data.setup("predict")
    assert data.test_names == ["validation"]
    assert ids(data.predict_dataloader()[0]) == ["v", "w"]


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("fit", "nothing to train on"),
        (TrainerFn.TESTING, "no rows to score"),
        (TrainerFn.PREDICTING, "no rows to answer"),
    ],
)
def test_a_missing_source_is_an_error_that_says_what_to_give(stage, says):
    with pytest.raises(DataError, match=f"{says}.*data\\."):
        module().setup(stage)


def test_files_are_prepared_before_they_are_read():
    prepared = []
    module(
        root="folder", download=False, prepare=lambda *given: prepared.append(given)
    ).prepare_data()
    assert prepared == [(Path("folder"), False)]


class ImageCache(Letters):
    """Opens the image of a row, as a real processor does."""

    def encode(self, conversation, *, prompt=False):
        for image in conversation.images:
            image.open()
        return super().encode(conversation, prompt=prompt)


@pytest.fixture
def files(tmp_path):
    """Twenty rows about images, of which that of the third is no image."""
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    rows = (
        {"id": str(number), "query": f"<img>{number}.png</img>", "response": "x"}
        for number in range(20)
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_broken_image_is_an_error(files):
    data = DataModule(processor=ImageCache(), read=read_rows, root=files, train="rows.jsonl")
    data.setup("fit")
    with pytest.raises(DataError, match=r"2\.png cannot be read as an image"):
        list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_with_a_broken_image_may_be_dropped_and_is_listed(files, workers, caplog):
    data = DataModule(
        processor=ImageCache(),
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
        seen += [
            row.id
            for batch in data.train_dataloader()
            for row in data.on_before_batch_transfer(batch, 0).conversations
        ]
    assert sorted(seen) == sorted([str(number) for number in range(20) if number != 2] * 2)
    [finding] = map(json.loads, (files / "run/findings.jsonl").read_text().splitlines())
    assert finding["set"] == "train"
    assert finding["kind"] == "dropped"
    assert "2.png cannot be read as an image" in finding["message"]
    assert caplog.text.count("is left out") == 1


def test_too_many_dropped_rows_stop_the_run(files):
    (files / "7.png").write_bytes(b"")
    data = DataModule(
        processor=ImageCache(),
        read=read_rows,
        root=files,
        train="rows.jsonl",
        on_bad_image="drop",
        max_bad_fraction=0.05,
    )
    data.trainer = trainer(files / "run")
    data.trainer.training = True
    data.setup("fit")
    with pytest.raises(
        DataError,
        match=r"2 of 20 rows of train had to be left out, more than data\.max_bad_fraction=0\.05 allows",
    ):
        [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]


@pytest.mark.parametrize(("gone", "stops"), [(1, False), (2, True)])
def test_rows_with_missing_images_may_be_dropped_before_training(files, gone, stops):
    options = {
        "processor": ImageCache(),
        "read": read_rows,
        "root": files,
        "train": "rows.jsonl#10",
        "max_bad_fraction": 0.1,
    }
    for row in list(DataModule(**options).datasets[""].open_training().stages[0])[:gone]:
        (files / f"{row.id}.png").unlink()
    with pytest.raises(DataError, match=rf"{gone} of 10 rows cannot be used"):
        DataModule(**options).setup("fit")
    data = DataModule(**options, on_bad_image="drop")
    data.trainer = trainer(files / "run")
    with (
        pytest.raises(DataError, match="2 of 10 rows of data have images that cannot be opened")
        if stops
        else nullcontext()
    ):
        data.setup("fit")
    found = [json.loads(line) for line in (files / "run/findings.jsonl").read_text().splitlines()]
    assert [finding["kind"] for finding in found] == ["dropped"] * gone
    assert stops or len(Concat(data.train)) == 9


def test_only_broken_images_are_a_reason_to_drop_a_row(files):
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
                raise Dropped("rows:3: c is too long")
            return super().length(conversation)

    def noting(source, read_options):
        return [
            dataclasses.replace(row, notes=("rows:1: box clipped",) if row.id == "a" else ())
            for row in read(source, read_options)
        ]

    data = DataModule(processor=Long(), read=noting, train="abcd")
    data.trainer = trainer(tmp_path)
    data.setup("fit")
    assert sorted(ids(data.train_dataloader())) == list("abd")
    assert [
        json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()
    ] == [
        {"set": "data", "kind": "note", "index": 0, "id": "a", "message": "rows:1: box clipped"},
        {
            "set": "data",
            "kind": "dropped",
            "index": 2,
            "id": "c",
            "message": "rows:3: c is too long",
        },
    ]
    assert "1 rows are left out, 1 are repaired" in caplog.text


def test_predictions_are_numbered_over_all_files_of_a_set():
    data = module(test={"both": ["abc", "de"]}, eval_batch_size=2)
    data.setup("test")
    rows = [row for batch in data.test_dataloader()[0] for row in batch.conversations]
    assert [(row.id, row.index) for row in rows] == [
        ("a", 0),
        ("b", 1),
        ("c", 2),
        ("d", 3),
        ("e", 4),
    ]


def test_batches_are_packed_or_kept_within_a_budget():
    class Words(Letters):
        def length(self, conversation):
            return len(conversation.id) * 3 + 1, 1

        def encode(self, conversation, *, prompt=False):
            sample = super().encode(conversation)
            ids = torch.ones(self.length(conversation)[0], dtype=torch.int64)
            return dataclasses.replace(sample, input_ids=ids, labels=ids)

    options = {"processor": Words(), "read": read, "train": "abcdefgh", "max_tokens": 13}
    for packing, expected in (
        (False, [(2, 4), (3, 4), (3, 4)]),
        (True, [(1, 13), (1, 13), (1, 13)]),
    ):
        data = DataModule(**options, packing=packing)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert sorted(tuple(batch.input_ids.shape) for batch in batches) == expected
    assert sorted(batch.lengths for batch in batches) == [(4, 4), (4, 4, 4), (4, 4, 4)]
    assert [batch.segment_bounds.tolist() for batch in batches if len(batch.lengths) == 2] == [
        [0, 4, 8, 12, 13, 13, 13, 13]
    ]
    assert {(len(batch.segment_bounds), batch.longest_segment) for batch in batches} == {(8, 4)}


def test_a_row_over_the_budget_of_tokens_is_named_with_what_to_do():
    data = module(train="abc", max_tokens=1)
    data.setup("fit")
    data.trainer = trainer(None)
    for asks in (data.train_dataloader, data.steps_of_run):
        with pytest.raises(
            DataError,
            match=r"row 'a' has 2 tokens, more than data\.max_tokens=1; raise it, or leave .* model\.max_length=1",
        ):
            asks()


@pytest.mark.parametrize(
    "option",
    [
        {"order": "random"},
        {"on_bad_image": "ignore"},
        {"packing": "maybe"},
        {"max_tokens": "many"},
        {"max_tokens": 0},
    ],
)
def test_a_misspelt_choice_is_an_error(option):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(option))} is .* or "):
        module(**option)
