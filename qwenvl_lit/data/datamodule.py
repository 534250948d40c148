"""The rows of one or several datasets, batched for training, validation, testing and prediction."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from qwenvl_lit.data.collate import Pack, Pad
from qwenvl_lit.data.loop_state import data_position
from qwenvl_lit.data.mixture import DatasetSpec, OpenedDataset
from qwenvl_lit.data.samplers import BatchSampler, Position
from qwenvl_lit.data.split import Concat, Rows, Subset, places
from qwenvl_lit.types import BadImage, Batch, DataError, Dropped, ImageSource, Sample

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

FINDINGS = (
    "findings.jsonl"  # in the run folder: rows that were left out, repaired or kept with a fault
)
log = logging.getLogger(__name__)


class DataModule(lightning.LightningDataModule):
    """Opens datasets as rows and rows as batches.

    All rows to learn from, and the validation rows, are looked at before training: how long each is, which are to be left out, and
    whether one cannot be used. What is left out or repaired, then or later, is listed in `findings.jsonl` of the run.

    Args:
        processor: encodes conversations.
        datasets: several, by name; without them there is one, and `source` are the arguments of its `DatasetSpec`.
        order: "mixed" shuffles all rows together; "staged" goes through the files one after the other, each shuffled.
        batch_size, eval_batch_size: rows a process and step, in training and otherwise.
        max_tokens: in place of `batch_size` as many rows as have no more tokens than this together, padding included.
        group_by_length: rows of a batch are alike in length, those of validation too, the longest first.
        packing: the rows of a batch form a single one, padded to `max_tokens`; none sees another.
        on_bad_image: "error", or "drop": rows whose images cannot be opened are left out.
        max_bad_fraction: more than this share of an epoch's rows dropped for their images is an error.
        generated_validation_rows: validation answers to generate and score during training; the loss takes all rows.
        seed: of the order of each epoch, and of a single dataset's draws.
    """

    def __init__(
        self,
        *,
        processor: Processor,
        datasets: Mapping[str, DatasetSpec] | None = None,
        order: Literal["mixed", "staged"] = "mixed",
        batch_size: int = 1,
        eval_batch_size: int = 1,
        max_tokens: int | None = None,
        group_by_length: bool = False,
        packing: bool = False,
        on_bad_image: Literal["error", "drop"] = "error",
        max_bad_fraction: float = 0.01,
        generated_validation_rows: int = 0,
        num_workers: int = 0,
        seed: int = 42,
        **source: Any,
    ):
        super().__init__()
        for name, value, choices in (
            ("order", order, ("mixed", "staged")),
            ("on_bad_image", on_bad_image, ("error", "drop")),
        ):
            if value not in choices:
                raise ValueError(f"data.{name} is {' or '.join(choices)}, got {value!r}")
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"data.{name} is a whole number, 1 or more, got {value!r}")
        if not isinstance(max_tokens, int | None) or (max_tokens is not None and max_tokens < 1):
            raise ValueError(
                f"data.max_tokens is a whole number, 1 or more, or null, got {max_tokens!r}"
            )
        for name, value in (("packing", packing), ("group_by_length", group_by_length)):
            if not isinstance(value, bool):
                raise ValueError(f"data.{name} is true or false, got {value!r}")
        if packing and max_tokens is None:
            raise ValueError(
                "data.packing=true needs to know how many tokens a packed row has at most, say data.max_tokens=8192"
            )
        if datasets is not None and source:
            raise ValueError(
                f"data.{next(iter(source))} belongs to a single dataset; give it to one of data.datasets"
            )
        self.allow_zero_length_dataloader_with_multiple_devices = (
            True  # a rank may have no row of a small test set
        )
        self.processor = processor
        self.datasets = (
            {"": DatasetSpec(seed=seed, **source)} if datasets is None else dict(datasets)
        )
        self.order = order
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_tokens = max_tokens
        self.group_by_length = group_by_length
        self.packing = packing
        self.on_bad_image = on_bad_image
        self.max_bad_fraction = max_bad_fraction
        self.generated_validation_rows = generated_validation_rows
        self.num_workers = num_workers
        self.seed = seed
        self.train: list[Rows] = []
        self.validation: Rows = ()
        self.test: dict[str, Rows] = {}
        self.answered: Mapping[
            str, Mapping[int, str]
        ] = {}  # by set, index and id of rows that are not to be predicted again
        self._lengths: np.ndarray | None = None  # of the rows of `train`, joined
        self._validation_lengths: np.ndarray | None = None
        self._bad: dict[str, set[str]] = {}  # by set, what was said of rows that loaders dropped

    def prepare_data(self) -> None:
        for source in self.datasets.values():
            source.prepare_files()

    def setup(self, stage: str) -> None:
        """Open what `stage` needs.

        Raises:
            DataError: the dataset does not have it, or has rows that cannot be used.
        """
        if stage == "test":
            self.test = self._test_sets() or self._validation_sets()
        elif stage == "predict":
            self.test = self._validation_sets() or self._test_sets()
        elif not any(source.train for source in self.datasets.values()):
            raise DataError("there is nothing to train on: give data.train=FILE")
        else:
            self._open_training()
        if stage in ("test", "predict") and not any(map(len, self.test.values())):
            asked = (
                "score" if stage == "test" else "answer"
            )  # Lightning's own name of a stage prints as TrainerFn.TESTING
            raise DataError(
                f"the dataset has no rows to {asked}: give data.test=FILE or data.validation=FILE"
            )

    def sets(self) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """What is learned from and held out, `train` (each row once) and `validation`, and the test sets; by name, without empty ones.

        Nothing is written: a split that the run has not drawn yet is drawn as it would be.
        """
        learned: dict[str, Rows] = {}
        for name, source in self.datasets.items():
            drawn = source.split_file is not None and Path(source.split_file).exists()
            opened = replace(
                source, split_file=source.split_file if drawn else None
            ).open_training()
            bottoms, place = places(Concat(opened.stages))
            learned[_joint(name, "train")] = Subset(Concat(bottoms), np.unique(place))
            learned[_joint(name, "validation")] = opened.validation
        tests = {
            f"{name} (test)" if name in learned else name: rows
            for name, rows in self._test_sets().items()
        }
        return tuple(
            {name: rows for name, rows in some.items() if len(rows)} for some in (learned, tests)
        )

    def _test_sets(self) -> dict[str, Rows]:
        opened = {name: source.open_tests() for name, source in self.datasets.items()}
        return {
            name if len(sets) == 1 and name else _joint(name, one): rows
            for name, sets in opened.items()
            for one, rows in sets.items()
        }

    def _validation_sets(self) -> dict[str, Rows]:
        opened = {
            name or "validation": source.open_validation() for name, source in self.datasets.items()
        }
        return {name: rows for name, rows in opened.items() if len(rows)}

    def _open_training(self) -> None:
        opened = self._measured(
            {name: source.open_training() for name, source in self.datasets.items()}
        )
        self._lengths = np.concatenate(
            [some for parts in opened.values() for some in parts.lengths[:-1]]
        )
        self._validation_lengths = np.concatenate([parts.lengths[-1] for parts in opened.values()])
        self.train = [rows for parts in opened.values() for rows in parts.stages]
        self.validation = Concat([parts.validation for parts in opened.values()])
        self.__dict__.pop("_batches", None)  # of rows before
        if not any(map(len, self.train)):
            raise DataError(f"no row is left to train on; {FINDINGS} of the run says why")

    def _measured(self, opened: Mapping[str, OpenedDataset]) -> dict[str, OpenedDataset]:
        """One rank does the work, on all cores, and the others find it in the cache."""
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        if self._rank:
            self.trainer.strategy.barrier("rows are measured")
        options = {"workers": cores, "drop_bad": self.on_bad_image == "drop"}
        measured = {
            name: self.datasets[name].measured(parts, self.processor, **options)
            for name, parts in opened.items()
        }
        if self._world_size > 1 and not self._rank:
            self.trainer.strategy.barrier("rows are measured")
        for name, parts in measured.items():
            if parts.findings and not self._rank:
                dropped = sum(one.kind == "dropped" for one in parts.findings)
                log.warning(
                    "%s: %d rows are left out, %d are repaired or kept with a fault; %s of the run lists them. The first: %s",
                    name or "data",
                    dropped,
                    len({one.index for one in parts.findings if one.kind == "note"}),
                    FINDINGS,
                    parts.findings[0].message,
                )
                self._list({"set": name or "data", **asdict(one)} for one in parts.findings)
            if parts.bad > self.max_bad_fraction * parts.distinct:
                raise DataError(
                    f"{parts.bad} of {parts.distinct} rows of {name or 'data'} have images that cannot be opened, more than "
                    f"data.max_bad_fraction={self.max_bad_fraction} allows; {FINDINGS} of the run lists them"
                )
        return measured

    @property
    def test_names(self) -> list[str]:
        """Names of the sets that `test` scores or `predict` answers, in the order of the dataloaders.

        `test` takes the test sets, else the validation rows; `predict` the validation rows, else the test sets.
        """
        return list(self.test)

    def train_dataloader(self) -> DataLoader:
        batches = self._batches
        collate: Pad | Pack = Pad(pad_id=self.processor.pad_id)
        if self.packing:
            limits = {
                "max_tokens": self.max_tokens,
                "max_rows": batches.max_rows,
                "longest": int(self._lengths.max()),
            }
            collate = Pack(pad_id=self.processor.pad_id, **limits)
        return self._loader(Concat(self.train), collate, batch_sampler=batches)

    @cached_property
    def _batches(self) -> BatchSampler:
        """Of training; packing takes a while, and is done once for all who ask."""
        if self.max_tokens is not None and self._lengths.max() > self.max_tokens:
            longest = Concat(self.train)[int(self._lengths.argmax())]
            raise DataError(
                f"{longest.where or 'data'}: row {longest.id!r} has {self._lengths.max()} tokens, more than data.max_tokens="
                f"{self.max_tokens}; raise it, or leave such rows out with model.max_length={self.max_tokens} model.too_long=drop"
            )
        return BatchSampler(
            [*map(len, self.train)] if self.order == "staged" else [sum(map(len, self.train))],
            batch_size=self.batch_size,
            lengths=self._lengths,
            group_by_length=self.group_by_length,
            max_tokens=self.max_tokens,
            packing=self.packing,
            seed=self.seed,
            rank=self._rank,
            world_size=self._world_size,
            position=self._position if self.trainer else None,
        )

    def steps_of_run(self) -> float:
        """Optimizer steps that the trainer makes, once `setup` has looked at the rows; inf if only time ends it.

        Lightning's own `estimated_stepping_batches` starts the workers for it, which then know nothing of what is set up later.
        """
        trainer = self.trainer
        batches, limit = len(self._batches), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return steps
        return min(
            steps, math.ceil(batches / trainer.accumulate_grad_batches) * max(1, trainer.max_epochs)
        )

    def epochs_of_run(self) -> float:
        """How often the trainer goes through the rows, as `steps_of_run`."""
        return (
            self.steps_of_run() * self.trainer.accumulate_grad_batches / max(1, len(self._batches))
        )

    def largest_batch(self) -> tuple[int, int]:
        """Rows and tokens of each that a batch to train on has at most, once `setup` has looked at the rows."""
        longest = int(self._lengths.max())
        return (
            self.batch_size if self.max_tokens is None else -(-self.max_tokens // longest)
        ), longest

    def _position(self) -> Position:
        return data_position(self.trainer)

    def val_dataloader(self) -> list[DataLoader]:
        """Two loaders: every row with its answer, for the loss; prompts of the first `generated_validation_rows`, to generate."""
        if not len(self.validation):
            return []
        lengths = self._validation_lengths if self.group_by_length else None
        loaders = [self._eval_loader(self.validation, prompt=False, lengths=lengths)]
        if self.generated_validation_rows:
            some = range(min(self.generated_validation_rows, len(self.validation)))
            loaders.append(self._eval_loader(Subset(self.validation, some), prompt=True))
        return loaders

    def test_dataloader(self) -> list[DataLoader]:
        return [
            self._eval_loader(rows, prompt=True, lengths=self._prompt_sizes(rows))
            for rows in self.test.values()
        ]

    def predict_dataloader(self) -> list[DataLoader]:
        """As `test_dataloader`, without the rows that are `answered`; if all are, the last one is answered anew, so that there is a loop.

        Raises:
            DataError: the answers are to other rows.
        """
        left = {name: self._unanswered(name, rows) for name, rows in self.test.items()}
        if not any(map(len, left.values())):
            left[self.test_names[-1]] = np.array([len(self.test[self.test_names[-1]]) - 1])
        return [
            self._eval_loader(rows, prompt=True, lengths=self._prompt_sizes(rows), among=left[name])
            for name, rows in self.test.items()
        ]

    def _unanswered(self, name: str, rows: Rows) -> np.ndarray:
        answered = self.answered.get(name, {})
        for index, id in answered.items():
            if index >= len(rows) or rows[index].id != id:
                here = f"is {rows[index].id!r}" if index < len(rows) else "does not exist"
                raise DataError(
                    f"answered: its row {index} of {name} is {id!r}, which {here} now; were these answers to other data?"
                )
        return np.setdiff1d(
            np.arange(len(rows)), np.fromiter(answered, dtype=np.int64, count=len(answered))
        )

    def _prompt_sizes(self, rows: Rows) -> np.ndarray | None:
        """About how long each prompt is, coarsely: rows of like length stay in their order, and questions about one image together."""
        if self.eval_batch_size == 1:
            return None
        return np.array(
            [_prompt_size(rows, place) // 64 for place in range(len(rows))], dtype=np.int64
        )

    def _eval_loader(
        self,
        rows: Rows,
        *,
        prompt: bool,
        lengths: np.ndarray | None = None,
        among: np.ndarray | None = None,
    ) -> DataLoader:
        order = np.arange(len(rows)) if among is None else among
        if lengths is not None:
            order = order[
                np.argsort(-lengths[order], kind="stable")
            ]  # the longest first: memory shows at once
        own = order[self._rank :: self._world_size]  # no row repeated, none lost
        pad = Pad(pad_id=self.processor.pad_id, side="left" if prompt else "right")
        return self._loader(
            rows, pad, prompt=prompt, batch_size=self.eval_batch_size, sampler=own.tolist()
        )

    def _loader(
        self, rows: Rows, collate: Pad | Pack, *, prompt: bool | None = None, **options: Any
    ) -> DataLoader:
        dataset = EncodedDataset(
            rows,
            self.processor,
            prompt=bool(prompt),
            numbered=prompt is not None,
            drop_bad=self.on_bad_image == "drop",
        )
        return ResumableDataLoader(
            dataset=dataset,
            collate_fn=collate,
            num_workers=self.num_workers,
            worker_init_fn=outlive_signals,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lists the rows that `batch` lacks.

        Raises:
            DataError: they are too many by now.
        """
        if batch.dropped:
            trainer = self.trainer
            name, rows = "train", sum(map(len, self.train))
            if trainer.validating or trainer.sanity_checking:
                name, rows = "validation", len(self.validation)
            elif trainer.testing or trainer.predicting:
                name, rows = (
                    list(self.test.items())[dataloader_idx][0],
                    len(list(self.test.values())[dataloader_idx]),
                )
            self._note_dropped(name, rows, batch.dropped)
        return batch

    def _note_dropped(self, name: str, rows: int, messages: Sequence[str]) -> None:
        known = self._bad.setdefault(name, set())
        new = [message for message in dict.fromkeys(messages) if message not in known]
        if new and not known:
            log.warning(
                "a row of %s is left out, and so will be others like it; %s of the run lists them. %s",
                name,
                FINDINGS,
                new[0],
            )
        known.update(new)
        self._list({"set": name, "kind": "dropped", "message": message} for message in new)
        if len(known) > self.max_bad_fraction * rows / self._world_size:
            share = f" of rank {self._rank}'s share" if self._world_size > 1 else ""
            raise DataError(
                f"{len(known)} of {rows} rows of {name}{share} had to be left out, more than data.max_bad_fraction={self.max_bad_fraction} "
                f"allows; {FINDINGS} of the run lists them. The last: {messages[-1]}"
            )

    def _list(self, findings: Iterable[dict[str, Any]]) -> None:
        if self.trainer is None:
            return
        file = Path(self.trainer.default_root_dir, FINDINGS)
        file = file.with_stem(f"{file.stem}.rank{self._rank}") if self._rank else file
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in findings)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


def _joint(dataset: str, name: str) -> str:
    return f"{dataset}_{name}" if dataset else name


def outlive_signals(worker: int) -> None:
    """A cluster that stops a run signals its workers too, and the run needs them to end its step: only the run itself may end them."""
    stops = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)

    def heed_the_run() -> None:
        while signal.sigwaitinfo(stops).si_pid != os.getppid():
            pass
        os._exit(0)

    Thread(target=heed_the_run, daemon=True).start()


def _prompt_size(rows: Rows, place: int) -> int:
    """In characters; an image counts as 1024."""
    try:
        turns = rows[place].prompt().turns
    except DataError:
        return 0  # said when the row is fetched
    return sum(
        len(part) if isinstance(part, str) else 1024 if isinstance(part, ImageSource) else 32
        for turn in turns
        for part in turn.parts
    )


class ResumableDataLoader(DataLoader):
    """A loader that a run goes on with where it stopped: its place is that of the trainer's counters, see `DataModule._position`."""

    def state_dict(self) -> dict[str, int]:
        """Lightning stores this with a checkpoint taken while training."""
        sampler = self.batch_sampler
        return {
            "batches": len(self),
            **(
                {"processes": sampler.world_size, "seed": sampler.seed}
                if isinstance(sampler, BatchSampler)
                else {}
            ),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Raises:
            DataError: the batches are not those of the run that stopped.
        """
        if state != (now := self.state_dict()):
            raise DataError(
                f"the run that stopped had {state} for an epoch, this one has {now}; go on with the same data and processes"
            )


class EncodedDataset(Dataset):
    """Rows as samples, encoded when they are fetched; a row that is to be left out as the `Dropped` that says why.

    Args:
        numbered: conversations get their place among `rows` as index, whatever file they come from.
        drop_bad: rows whose images cannot be opened are left out.
    """

    def __init__(
        self, rows: Rows, processor: Processor, *, prompt: bool, numbered: bool, drop_bad: bool
    ):
        self.rows = rows
        self.processor = processor
        self.prompt = prompt
        self.numbered = numbered
        self.drop_bad = drop_bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Sample | Dropped:
        try:
            conversation = self.rows[place]
            if self.numbered:
                conversation = replace(conversation, index=place)
            return self.processor.encode(conversation, prompt=self.prompt)
        except Dropped as decision:
            return decision
        except BadImage as fault:
            if self.drop_bad:
                return Dropped(str(fault))
            raise
