"""A run that was stopped goes on with the batches that it would have had."""

from contextlib import nullcontext
from typing import ClassVar

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from toy_task import trainer

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.types import Conversation, DataError, Sample

LETTERS = "abcdefghijklmnopqrst"


class Letters:
    """Encodes a conversation as as many tokens as its place in the alphabet."""

    pad_id = 0
    settings: ClassVar = {}

    def length(self, conversation):
        return LETTERS.index(conversation.id) + 2, 1

    def encode(self, conversation, *, prompt=False):
        ids = torch.ones(self.length(conversation)[0], dtype=torch.int64)
        return Sample(
            conversation=conversation,
            input_ids=ids,
            labels=ids,
            vision_positions=torch.empty(0, dtype=torch.int64),
            vision={},
        )


class Recorder(lightning.LightningModule):
    """Remembers the rows of every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []
        self.stops_at = None

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stops_at:
            raise RuntimeError("the machine went down")
        self.seen.append("".join(conversation.id for conversation in batch.conversations))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read(source, read_options):
    return [Conversation(id=letter, turns=(), index=place) for place, letter in enumerate(source)]


def fit(folder, *callbacks, ckpt=None, stops_at=None, data=(), **options):
    """The batches that one process sees."""
    task = Recorder()
    task.stops_at = stops_at
    module = DataModule(
        processor=Letters(), read=read, train=LETTERS, seed=1, **{"batch_size": 3, **dict(data)}
    )
    fitted = trainer(
        folder,
        *callbacks,
        enable_checkpointing=bool(callbacks),
        accumulate_grad_batches=2,
        **{"max_epochs": 3, **options},
    )
    with pytest.raises(RuntimeError, match="went down") if stops_at else nullcontext():
        fitted.fit(task, module, ckpt_path=ckpt)
    return task.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "limit", [{}, {"max_epochs": -1, "max_steps": 11}], ids=["epochs", "steps"]
)
def test_a_resumed_epoch_goes_on_with_the_batches_it_would_have_had(tmp_path, workers, limit):
    keep = ModelCheckpoint(
        dirpath=tmp_path,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )
    data = {"num_workers": workers}
    whole = fit(tmp_path, keep, data=data, **limit)
    assert (
        len(whole) == 21 if not limit else 19
    )  # 7 batches an epoch, 4 steps of 2, 2, 2 and 1 of them
    assert sorted("".join(whole[:7])) == sorted(LETTERS)
    assert whole[:7] != whole[7:14]
    done = {1: 2, 2: 4, 3: 6, 5: 9, 7: 13, 9: 16}
    for step in (2, 5, 7) if workers else done:
        assert (
            fit(tmp_path, ckpt=tmp_path / f"{step}.ckpt", data=data, **limit) == whole[done[step] :]
        ), step


def test_a_run_goes_on_after_a_whole_epoch(tmp_path):
    keep = ModelCheckpoint(
        dirpath=tmp_path,
        filename="{epoch}",
        save_top_k=-1,
        auto_insert_metric_name=False,
        save_on_train_epoch_end=True,
    )
    whole = fit(tmp_path, keep)
    assert fit(tmp_path, ckpt=tmp_path / "0.ckpt") == whole[7:]
    assert fit(tmp_path, ckpt=tmp_path / "1.ckpt", data={"num_workers": 1}) == whole[14:]


def test_the_batch_at_which_a_run_broke_off_is_not_lost(tmp_path):
    whole = fit(tmp_path)
    assert fit(tmp_path, OnExceptionCheckpoint(tmp_path, "broken"), stops_at=10) == whole[:10]
    assert fit(tmp_path, ckpt=tmp_path / "broken.ckpt") == whole[10:]


@pytest.mark.parametrize(
    "data",
    [{"group_by_length": True}, {"max_tokens": 30}, {"max_tokens": 30, "packing": True}],
    ids=str,
)
def test_batches_by_length_go_on_too(tmp_path, data):
    keep = ModelCheckpoint(
        dirpath=tmp_path,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )
    whole = fit(tmp_path, keep, data=data)
    assert fit(tmp_path, ckpt=tmp_path / "2.ckpt", data=data) == whole[4:]


def test_other_data_under_a_checkpoint_is_an_error(tmp_path):
    keep = ModelCheckpoint(
        dirpath=tmp_path,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )
    fit(tmp_path, keep)
    with pytest.raises(DataError, match=r"'batches': 7.*'batches': 10.*same data"):
        fit(tmp_path, ckpt=tmp_path / "2.ckpt", data={"batch_size": 2})


def test_overfitting_repeats_the_same_batches(tmp_path):
    seen = fit(tmp_path, overfit_batches=2)
    assert seen == seen[:2] * 3
