from pathlib import Path
from typing import ClassVar

import pytest
import torch

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.types import Conversation, DataError, Turn


class Letters:
    """Encodes a conversation as its number and its letters, or as the number alone."""

    pad_id = 0
    settings: ClassVar = {}

    def length(self, conversation):
        return len(conversation.id) + 1, len(conversation.id)

    def encode(self, conversation, *, prompt=False):
        from qwenvl_lit.types import Sample

        ids = torch.tensor([conversation.index + 1] + ([] if prompt else [9] * len(conversation.id)))
        labels = torch.where(ids == 9, ids, -100)
        return Sample(conversation=conversation, input_ids=ids, labels=labels, vision_positions=torch.tensor([]), vision={})


def read(source: str, reading) -> list[Conversation]:
    """`abc` is a source of three rows, a, b and c."""
    return [Conversation(id=letter, index=place, turns=(Turn(role="user", parts=(letter,)),)) for place, letter in enumerate(source)]


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
    assert dict(zip(data.test_names, map(ids, data.test_dataloader()), strict=True)) == {"easy": ["a", "b"], "hard": ["c", "d", "e"]}
    data.setup("predict")
    assert data.test_names == ["validation"]
    assert ids(data.predict_dataloader()[0]) == ["v", "w"]


@pytest.mark.parametrize(
    ("stage", "says"), [("fit", "nothing to train on"), ("test", "no rows to test"), ("predict", "no rows to predict")]
)
def test_a_missing_source_is_an_error_that_says_what_to_give(stage, says):
    with pytest.raises(DataError, match=f"{says}.*data\\."):
        module().setup(stage)


def test_files_are_prepared_before_they_are_read():
    prepared = []
    module(root="folder", download=False, prepare=lambda *given: prepared.append(given)).prepare_data()
    assert prepared == [(Path("folder"), False)]
