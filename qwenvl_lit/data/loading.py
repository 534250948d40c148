"""Encodes rows in data workers, and loads batches from the position of a resumed run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import itemgetter
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from qwenvl_lit.data.collate import empty_batch
from qwenvl_lit.data.orphans import end_with_parent, parent_pid
from qwenvl_lit.data.samplers import BatchSampler
from qwenvl_lit.data.selection import Rows
from qwenvl_lit.data.survey import DROP_ADVICE
from qwenvl_lit.types import BadImage, DataError, Dropped, ImageSource, Sample

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor


class EncodedDataset(Dataset):
    """Rows as samples, encoded when they are fetched.

    A row that is left out becomes the `Dropped` that gives the reason.

    Args:
        prompt: encode the prompts without their answers.
        renumber: set the index of a conversation to its position among `rows`; readers number the
            rows of each file from 0.
        drop_bad: leave out rows whose images cannot be opened.
    """

    def __init__(
        self, rows: Rows, processor: Processor, *, prompt: bool, renumber: bool, drop_bad: bool
    ):
        self.rows = rows
        self.processor = processor
        self.prompt = prompt
        self.renumber = renumber
        self.drop_bad = drop_bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample | Dropped:
        try:
            conversation = self.rows[index]
            if self.renumber:
                conversation = replace(conversation, index=index)
            sample = self.processor.encode(conversation, prompt=self.prompt)
            if self.prompt:
                cache_image_keys(sample.images)
            return sample
        except Dropped as reason:
            return reason
        except BadImage as error:
            if self.drop_bad:
                return Dropped(str(error)).in_row(error.where, error.row_id)
            raise BadImage(f"{error}; {DROP_ADVICE}") from error


def cache_image_keys(images: Iterable[ImageSource]) -> None:
    """Computes the keys of a prompt's images, by which their features are cached.

    Otherwise the main process would read and hash all files of a batch before it answers it.
    """
    for image in images:
        _ = image.key


class ResumableDataLoader(DataLoader):
    """A loader that refuses to resume a run with other batches than the run was started with.

    The position to resume at is not part of its state: the batch sampler reads it from the counters
    of the trainer, see `data_position`.
    """

    def state_dict(self) -> dict[str, int]:
        """Returns what determines the batches; Lightning stores it in checkpoints of training."""
        state = {"batches": len(self)}
        sampler = self.batch_sampler
        if isinstance(sampler, BatchSampler):
            state |= {"processes": sampler.world_size, "seed": sampler.seed}
        return state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Checks the state of the run that is resumed.

        Raises:
            DataError: the batches would not be those of that run.
        """
        now = self.state_dict()
        if state != now:
            raise DataError(
                f"an epoch of the run to resume had {state}, one of this run has {now}; "
                "resume with the same data and the same number of processes"
            )


def encoded_loader(
    rows: Rows,
    processor: Processor,
    collate: Callable[[list[Any]], Any],
    *,
    prompt: bool,
    renumber: bool,
    drop_bad: bool,
    num_workers: int,
    **batching: Any,
) -> ResumableDataLoader:
    """Returns a loader of encoded rows.

    Args:
        prompt, renumber, drop_bad: see `EncodedDataset`.
        batching: arguments of `DataLoader` that say which rows a batch has.
    """
    return ResumableDataLoader(
        dataset=EncodedDataset(
            rows, processor, prompt=prompt, renumber=renumber, drop_bad=drop_bad
        ),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_cluster_signals,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        **batching,
    )


def loader_without_rows(pad_id: int) -> DataLoader:
    """Returns a loader of one batch without rows, for a rank that has no row of a set.

    Lightning skips the whole loop on a rank without batches, with the hooks and collectives that
    the other ranks wait for.
    """
    return ResumableDataLoader([[empty_batch(pad_id)]], batch_size=1, collate_fn=itemgetter(0))


def _report(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Prints an error of a worker's threads, unless the parent has broken off a connection.

    A signal stops the parent while it receives a tensor; the parent says so itself.
    """
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def ignore_cluster_signals(worker_id: int) -> None:
    """Makes a data worker ignore Ctrl-C and the signals of clusters unless its parent sent them.

    A cluster that stops a run signals the whole process group. The trainer still needs its workers,
    to finish the step and to save a checkpoint.
    """
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads inherit it: none is started before
    end_with_parent()
    sys.excepthook = _report

    def wait_for_parent() -> None:
        while signal.sigwaitinfo(signals).si_pid != parent_pid():
            pass
        os._exit(0)

    Thread(target=wait_for_parent, daemon=True).start()
