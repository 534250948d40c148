"""The rows of a dataset, batched for training, validation, testing and prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.rows import Reading
from qwenvl_lit.data.split import Chosen, Joined, hold_out
from qwenvl_lit.types import Conversation, DataError, Sample

if TYPE_CHECKING:
    from qwenvl_lit.families.protocols import Processor

Rows = Sequence[Conversation]


class DataModule(lightning.LightningDataModule):
    """Opens sources as rows and rows as batches.

    Args:
        processor: encodes conversations.
        root: the dataset's folder, where relative sources and pictures are looked up.
        read: opens one source, `read(source, reading)`.
        train: sources to learn from.
        validation: a source; or how many rows (int) or which share of them (float below 1) to hold out from `train`.
        test: a source, or several by name, each scored apart.
        prepare: called once a machine, `prepare(root)`, before anything is read: writes or fetches files.
        order: "mixed" shuffles all of `train` together; "staged" goes through its sources one after the other, each shuffled.
        batch_size, eval_batch_size: rows a process and step, in training and otherwise.
        generated_validation_rows: validation answers to generate and score during training; the loss takes all rows.
        seed: of the held-out rows and of the order of each epoch.
        split_file: where held-out rows are remembered (see `hold_out`).
    """

    def __init__(
        self,
        *,
        processor: Processor,
        read: Callable[..., Rows],
        root: str | None = None,
        train: str | Sequence[str] | None = None,
        validation: str | int | float | None = None,
        test: str | Mapping[str, str] | None = None,
        prepare: Callable[[str | None], object] | None = None,
        order: Literal["mixed", "staged"] = "mixed",
        batch_size: int = 1,
        eval_batch_size: int = 1,
        generated_validation_rows: int = 0,
        num_workers: int = 0,
        seed: int = 42,
        split_file: str | None = None,
    ):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have no row of a small test set
        self.processor = processor
        self.root = root
        self.read = partial(read, reading=Reading(root=None if root is None else Path(root)))
        self.train_sources = [train] if isinstance(train, str) else list(train or ())
        self.validation_source = validation
        self.test_sources = {"test": test} if isinstance(test, str) else dict(test or {})
        self.prepare = prepare
        self.order = order
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.generated_validation_rows = generated_validation_rows
        self.num_workers = num_workers
        self.seed = seed
        self.split_file = Path(split_file) if split_file else None
        self.train: list[Rows] = []
        self.validation: Rows = ()
        self.test: dict[str, Rows] = {}

    def prepare_data(self) -> None:
        if self.prepare is not None:
            self.prepare(self.root)

    def setup(self, stage: str) -> None:
        """Open what `stage` needs.

        Raises:
            DataError: the dataset does not have it.
        """
        if stage == "test":
            self.test = {name: self.read(source) for name, source in self.test_sources.items()} or self._validation_as_test()
        elif stage == "predict":
            self.test = self._validation_as_test() or {name: self.read(source) for name, source in self.test_sources.items()}
        elif not self.train_sources:
            raise DataError("there is nothing to train on: give data.train=FILE")
        else:
            self._open_train_and_validation()
        if stage in ("test", "predict") and not any(map(len, self.test.values())):
            raise DataError(f"the dataset has no rows to {stage}: give data.test=FILE or data.validation=FILE")

    def _open_train_and_validation(self) -> None:
        if isinstance(self.validation_source, str):
            self.validation = self.read(self.validation_source)
            self.train = [self.read(source) for source in self.train_sources]
        elif self.validation_source:
            sources = [self.read(source) for source in self.train_sources]
            self.train, self.validation = hold_out(sources, self.validation_source, seed=self.seed, file=self.split_file)
        else:
            self.train = [self.read(source) for source in self.train_sources]

    def _validation_as_test(self) -> dict[str, Rows]:
        if isinstance(self.validation_source, str):
            return {"validation": self.read(self.validation_source)}
        if self.validation_source and self.train_sources:
            self._open_train_and_validation()
            return {"validation": self.validation}
        return {}

    @property
    def test_names(self) -> list[str]:
        """Names of the sets that `test` scores or `predict` answers, in the order of the dataloaders.

        `test` takes the test sets, else the validation rows; `predict` the validation rows, else the test sets.
        """
        return list(self.test)

    def train_dataloader(self) -> DataLoader:
        stages = self.train if self.order == "staged" else [Joined(self.train)]
        sampler = StagedSampler([len(rows) for rows in stages], seed=self.seed, rank=self._rank, world_size=self._world_size)
        return self._loader(Joined(stages), Pad(pad_id=self.processor.pad_id), self.batch_size, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader]:
        """Two loaders: every row with its answer, for the loss; prompts of the first `generated_validation_rows`, to generate."""
        if not self.validation:
            return []
        loaders = [self._eval_loader(self.validation, prompt=False)]
        if self.generated_validation_rows:
            some = range(min(self.generated_validation_rows, len(self.validation)))
            loaders.append(self._eval_loader(Chosen(self.validation, some), prompt=True))
        return loaders

    def test_dataloader(self) -> list[DataLoader]:
        return [self._eval_loader(rows, prompt=True) for rows in self.test.values()]

    predict_dataloader = test_dataloader

    def _eval_loader(self, rows: Rows, *, prompt: bool) -> DataLoader:
        own = range(self._rank, len(rows), self._world_size)  # no row repeated, none lost
        pad = Pad(pad_id=self.processor.pad_id, side="left" if prompt else "right")
        return self._loader(Chosen(rows, own), pad, self.eval_batch_size, prompt=prompt)

    def _loader(self, rows: Rows, pad: Pad, batch_size: int, *, prompt: bool = False, **options) -> DataLoader:
        return DataLoader(
            dataset=Encoded(rows, self.processor, prompt),
            batch_size=batch_size,
            collate_fn=pad,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


class Encoded(Dataset):
    """Rows as samples, encoded when they are fetched."""

    def __init__(self, rows: Rows, processor: Processor, prompt: bool):
        self.rows = rows
        self.processor = processor
        self.prompt = prompt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Sample:
        return self.processor.encode(self.rows[place], prompt=self.prompt)


class StagedSampler(Sampler[int]):
    """Goes through stages of given lengths in order, each shuffled anew every epoch; equal shares for all ranks.

    With several ranks the first rows of an epoch's order are repeated at its end, where its length does not divide evenly.
    """

    def __init__(self, lengths: Sequence[int], *, seed: int, rank: int = 0, world_size: int = 1):
        self.lengths = lengths
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-sum(self.lengths) // self.world_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order, start = [], 0
        for length in self.lengths:
            order += (torch.randperm(length, generator=generator) + start).tolist()
            start += length
        order += order[: len(self) * self.world_size - len(order)]
        return iter(order[self.rank :: self.world_size])
