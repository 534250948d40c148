"""A resumed run trains on the batches that the interrupted run would have had next."""

from contextlib import nullcontext
from typing import ClassVar

import lightning
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from toy_task import trainer

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import Conversation, DataError, Length, Sample, micro_batches_of

LETTERS = "abcdefghijklmnopqrst"


class Letters:
    """Encodes a letter as as many tokens as its position in the alphabet, plus two."""

    pad_id = 0
    supports_packing = True
    settings: ClassVar = {}
    collate_vision = staticmethod(concatenate_vision)

    def length(self, conversation):
        return Length(LETTERS.index(conversation.id) + 2, 1, 0)

    def encode(self, conversation, *, prompt=False):
        tokens = torch.ones(self.length(conversation).tokens, dtype=torch.int64)
        return Sample(
            conversation=conversation,
            input_ids=tokens,
            labels=tokens,
            vision_positions=torch.empty(0, dtype=torch.int64),
            vision={},
        )


class Recorder(lightning.LightningModule):
    """Records the rows of every batch."""

    def __init__(self, stops_at: int | None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []
        self.stops_at = stops_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stops_at:
            raise RuntimeError("the machine went down")
        rows = [row for part in micro_batches_of(batch) for row in part.conversations]
        self.seen.append("".join(row.id for row in rows))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read(source, read_options):
    return [Conversation(id=letter, turns=(), index=index) for index, letter in enumerate(source)]


def fit(folder, *callbacks, ckpt=None, stops_at=None, data=None, **options) -> list[str]:
    """Trains and returns the rows of each batch.

    Args:
        stops_at: the training step of this number raises.
        data: arguments of the DataModule.
    """
    recorder = Recorder(stops_at)
    data_options = {"read": read, "train": LETTERS, "batch_size": 3, **(data or {})}
    datamodule = DataModule(processor=Letters(), seed=1, **data_options)
    fitted = trainer(
        folder,
        *callbacks,
        enable_checkpointing=bool(callbacks),
        **{"max_epochs": 3, "accumulate_grad_batches": 2, **options},
    )
    with pytest.raises(RuntimeError, match="went down") if stops_at else nullcontext():
        fitted.fit(recorder, datamodule, ckpt_path=ckpt)
    return recorder.seen


def every_step(folder) -> ModelCheckpoint:
    """Saves a checkpoint STEP.ckpt after every optimizer step."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "limit", [{}, {"max_epochs": -1, "max_steps": 11}], ids=["epochs", "steps"]
)
def test_an_epoch_is_resumed_after_the_batches_that_are_done(tmp_path, workers, limit):
    data = {"num_workers": workers}
    whole = fit(tmp_path, every_step(tmp_path), data=data, **limit)
    # An epoch has 7 batches in 4 steps, of 2, 2, 2 and 1 batches; 11 steps have 7 + 7 + 6 batches.
    assert len(whole) == (20 if limit else 21)
    assert sorted("".join(whole[:7])) == sorted(LETTERS)
    assert whole[:7] != whole[7:14]
    done = {1: 2, 2: 4, 3: 6, 5: 9, 7: 13, 9: 16}
    for step in (2, 5, 7) if workers else done:
        resumed = fit(tmp_path, ckpt=tmp_path / f"{step}.ckpt", data=data, **limit)
        assert resumed == whole[done[step] :], step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_of_whole_steps_is_resumed_after_any_step(tmp_path, workers):
    data = {"batch_size": "auto", "rows_per_step": 6, "num_workers": workers}
    options = {"data": data, "accumulate_grad_batches": 1}
    whole = fit(tmp_path, every_step(tmp_path), **options)
    assert list(map(len, whole)) == [6, 6, 6, 2] * 3  # the steps of two batches of three
    for step in (1, 3, 6):
        assert fit(tmp_path, ckpt=tmp_path / f"{step}.ckpt", **options) == whole[step:], step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_parquet_files_is_resumed_exactly(tmp_path, workers):
    for number, letters in enumerate((LETTERS[:13], LETTERS[13:])):
        table = pa.table({"id": list(letters), "query": list(letters)})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    data = {"read": read_rows, "train": "*.parquet", "root": tmp_path, "num_workers": workers}
    data["cache"] = tmp_path / "cache"
    whole = fit(tmp_path, every_step(tmp_path), data=data, max_epochs=2)
    assert whole == fit(tmp_path, max_epochs=2)  # the batches of other files with these rows
    for step, done in ((2, 4), (5, 9)):
        resumed = fit(tmp_path, ckpt=tmp_path / f"{step}.ckpt", data=data, max_epochs=2)
        assert resumed == whole[done:], step


def test_a_run_is_resumed_after_a_whole_epoch(tmp_path):
    every_epoch = ModelCheckpoint(
        dirpath=tmp_path,
        filename="{epoch}",
        save_top_k=-1,
        auto_insert_metric_name=False,
        save_on_train_epoch_end=True,
    )
    whole = fit(tmp_path, every_epoch)
    assert fit(tmp_path, ckpt=tmp_path / "0.ckpt") == whole[7:]
    assert fit(tmp_path, ckpt=tmp_path / "1.ckpt", data={"num_workers": 1}) == whole[14:]


def test_the_batch_in_which_a_run_was_interrupted_is_not_lost(tmp_path):
    whole = fit(tmp_path)
    assert fit(tmp_path, OnExceptionCheckpoint(tmp_path, "broken"), stops_at=10) == whole[:10]
    assert fit(tmp_path, ckpt=tmp_path / "broken.ckpt") == whole[10:]


@pytest.mark.parametrize(
    "data",
    [{"group_by_length": True}, {"max_tokens": 30}, {"max_tokens": 30, "packing": True}],
    ids=str,
)
def test_batches_by_length_are_resumed_too(tmp_path, data):
    whole = fit(tmp_path, every_step(tmp_path), data=data)
    assert fit(tmp_path, ckpt=tmp_path / "2.ckpt", data=data) == whole[4:]


def test_resuming_with_other_batches_is_an_error(tmp_path):
    fit(tmp_path, every_step(tmp_path))
    with pytest.raises(DataError, match=r"'batches': 7.*'batches': 10.*same data"):
        fit(tmp_path, ckpt=tmp_path / "2.ckpt", data={"batch_size": 2})


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 3},
        {"max_epochs": -1, "max_steps": 11},
        {"max_epochs": 3, "max_steps": 5},
        {"max_epochs": 2, "limit_train_batches": 5},
        {"max_epochs": 2, "limit_train_batches": 0.5},
    ],
    ids=str,
)
def test_the_steps_of_a_run_are_known_in_advance(tmp_path, limits):
    data = DataModule(processor=Letters(), read=read, train=LETTERS, batch_size=3)
    fitted = trainer(tmp_path, accumulate_grad_batches=2, **limits)
    fitted.fit(Recorder(stops_at=None), data)
    assert data.steps_of_run() == fitted.global_step


def test_overfitting_repeats_the_same_batches(tmp_path):
    seen = fit(tmp_path, overfit_batches=2)
    assert seen == seen[:2] * 3
