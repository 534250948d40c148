"""The LightningDataModule: opens datasets, and batches their rows for every stage of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning
import numpy as np
from torch.utils.data import DataLoader

from qwenvl_lit.cores import available_cores
from qwenvl_lit.data.collate import Pack, Pad, check_packing
from qwenvl_lit.data.evaluation_batches import (
    EvaluationPlan,
    PromptSizes,
    by_length,
    plan_batches,
    prompt_sizes,
)
from qwenvl_lit.data.findings import FILENAME, FindingsLog, FindingsWriter
from qwenvl_lit.data.loading import encoded_loader, loader_without_rows
from qwenvl_lit.data.loop_state import data_position, optimizer_steps
from qwenvl_lit.data.micro_batches import ActivationCosts, BatchLimit, CutRows, CutStep
from qwenvl_lit.data.mixture import DatasetSpec, OpenedDataset
from qwenvl_lit.data.predictions import unanswered
from qwenvl_lit.data.samplers import BatchSampler
from qwenvl_lit.data.selection import Concat, Rows, Subset, spread
from qwenvl_lit.data.sets import all_sets, test_sets, validation_sets
from qwenvl_lit.settings import check_settings
from qwenvl_lit.types import Batch, DataError, micro_batches_of

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor


class DataModule(lightning.LightningDataModule):
    """Opens datasets, and batches their rows for training, validation, testing and prediction.

    Before training, all training and validation rows are read once: to measure their lengths, and
    to find the rows to leave out and those that cannot be used. Rows that are left out or repaired,
    then or later, are listed in `findings.jsonl` in the run folder.

    Args:
        processor: encodes conversations.
        datasets: several datasets by name. Without them there is one, and `dataset` holds the
            arguments of its `DatasetSpec`.
        order: "mixed" shuffles all rows together; "staged" trains on the files one after the
            other, each shuffled.
        batch_size: rows of a training batch per process. With "auto", a batch has the
            `rows_per_step` rows of an optimizer step, as micro-batches that `cut_steps` limits.
        rows_per_step: rows per process and optimizer step if `batch_size` is "auto"; None: one.
        eval_batch_size: rows per process and step of validation, test and prediction. "auto" asks
            the LightningModule's `rows_together`.
        max_tokens: in place of `batch_size`: as many rows per batch as together have at most this
            many tokens, padding included.
        group_by_length: rows of a batch have similar lengths, in training and validation.
            Validation starts with the longest rows. With `batch_size` "auto" only in validation.
        packing: the rows of a batch are packed into one row of `max_tokens`, in which no sample
            attends to another.
        on_bad_image: "error", or "drop": rows whose images cannot be opened are left out.
        max_bad_fraction: largest share of an epoch's rows that may be dropped for their images;
            more are an error.
        generated_validation_rows: number of validation rows that are answered and scored during
            training; the loss is computed on all validation rows.
        seed: seed of the order of each epoch, and of the random choices of a single dataset.
        answered: rows that `predict` leaves out because an earlier run has answered them: by set,
            their index and id.

    Raises:
        ValueError: an argument has a value that is not allowed, or lacks one that it requires.
    """

    def __init__(
        self,
        *,
        processor: Processor,
        datasets: Mapping[str, DatasetSpec] | None = None,
        order: Literal["mixed", "staged"] = "mixed",
        batch_size: int | Literal["auto"] = 1,
        rows_per_step: int | None = None,
        eval_batch_size: int | Literal["auto"] = 1,
        max_tokens: int | None = None,
        group_by_length: bool = False,
        packing: bool = False,
        on_bad_image: Literal["error", "drop"] = "error",
        max_bad_fraction: float = 0.01,
        generated_validation_rows: int = 0,
        num_workers: int = 0,
        seed: int = 42,
        answered: Mapping[str, Mapping[int, str]] | None = None,
        **dataset: Any,
    ):
        super().__init__()
        settings = {
            "order": order,
            "on_bad_image": on_bad_image,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_tokens": max_tokens,
            "max_bad_fraction": max_bad_fraction,
            "generated_validation_rows": generated_validation_rows,
            "num_workers": num_workers,
            "seed": seed,
            "packing": packing,
            "group_by_length": group_by_length,
        }
        check_settings("data", settings)
        if packing:
            check_packing(processor, max_tokens)
        if datasets is not None and dataset:
            raise ValueError(
                f"data.{next(iter(dataset))} belongs to a single dataset; "
                "give it to one of data.datasets"
            )
        # A rank may have no row of a small test set.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.processor = processor
        self.datasets = dict(datasets or {})
        if datasets is None:
            self.datasets = {"": DatasetSpec(seed=seed, **dataset)}
        self.order = order
        self.cuts_steps = batch_size == "auto" and max_tokens is None
        self.batch_size = 1 if batch_size == "auto" else batch_size
        self.rows_per_step = (rows_per_step or 1) if self.cuts_steps else 1
        self.eval_batch_size = eval_batch_size
        self.max_tokens = max_tokens
        self.group_by_length = group_by_length
        self.packing = packing
        self.on_bad_image = on_bad_image
        self.max_bad_fraction = max_bad_fraction
        self.generated_validation_rows = generated_validation_rows
        self.num_workers = num_workers
        self.seed = seed
        self.answered = answered or {}
        self.train: list[Rows] = []  # by stage
        self.validation: Rows = ()
        self.test: dict[str, Rows] = {}
        self.measured: dict[str, OpenedDataset] = {}  # what training opened, by dataset
        # (3, rows), the `Length` of the training rows, over all stages
        self.sizes: np.ndarray | None = None
        self._validation_lengths: np.ndarray | None = None
        self.plans: dict[str, EvaluationPlan] = {}  # by set, once its loader was made
        self._batch_sampler: BatchSampler | None = None  # made once: packing takes a while
        self._findings = FindingsLog(max_bad_fraction)

    def prepare_data(self) -> None:
        for dataset in self.datasets.values():
            dataset.prepare_files()

    def setup(self, stage: str) -> None:
        """Opens the rows that `stage` needs.

        Raises:
            DataError: there are none, or some of them cannot be used.
        """
        if stage == "test":
            self.test = test_sets(self.datasets) or validation_sets(self.datasets)
            self._require_test_rows("score")
        elif stage == "predict":
            self.test = validation_sets(self.datasets) or test_sets(self.datasets)
            self._require_test_rows("answer")
        elif any(dataset.train for dataset in self.datasets.values()):
            self._open_training()
        else:
            raise DataError("there is nothing to train on: give data.train=FILE")

    def sets(self) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """Opens the rows of all sets, see `all_sets`."""
        return all_sets(self.datasets)

    @property
    def test_names(self) -> list[str]:
        """Names of the sets that `test` scores or `predict` answers, ordered as the dataloaders.

        `test` uses the test sets, or without them the validation rows; `predict` uses the
        validation rows, or without them the test sets.
        """
        return list(self.test)

    def train_dataloader(self) -> DataLoader:
        batches = self._training_batches()
        collate: Pad | Pack | CutStep = Pad(**self._collation)
        if self.cuts_steps:
            collate = self.cut
        elif self.packing:
            collate = Pack(
                **self._collation,
                max_tokens=self.max_tokens,
                max_rows=batches.max_rows,
                longest=int(self.sizes[0].max()),
            )
        rows = Concat(self.train)
        return self._loader(rows, collate, prompt=False, renumber=False, batch_sampler=batches)

    def val_dataloader(self) -> list[DataLoader]:
        """Returns one loader for the loss, and one of prompts to answer.

        The first has every row with its answer, the second the prompts of
        `generated_validation_rows` rows, spread over datasets and files.
        """
        if not len(self.validation):
            return []
        self.plans = {}
        lengths = self._validation_lengths
        order = by_length(lengths) if self.group_by_length else np.arange(len(lengths))
        loaders = [self._eval_loader("validation", self.validation, order, lengths)]
        if self.generated_validation_rows:
            sets = [dataset.validation for dataset in self.measured.values()]
            answered = spread(sets, self.generated_validation_rows)
            answered_rows = Subset(self.validation, answered)
            loaders.append(self._prompt_loader("answered", answered_rows, sort=False))
        return loaders

    def test_dataloader(self) -> list[DataLoader]:
        self.plans = {}
        return [self._prompt_loader(name, rows) for name, rows in self.test.items()]

    def predict_dataloader(self) -> list[DataLoader]:
        """Returns the loaders of `test_dataloader` without the `answered` rows.

        Raises:
            DataError: the answers belong to other rows.
        """
        indices: dict[str, list[int]] = {}
        for name, rows in self.test.items():
            indices[name] = unanswered(name, rows, self.answered.get(name, {}))
        self.plans = {}
        return [self._prompt_loader(name, rows, indices[name]) for name, rows in self.test.items()]

    def steps_of_run(self) -> float:
        """Returns the number of optimizer steps of the run, after `setup`; inf without limit."""
        return optimizer_steps(self.trainer, batches=len(self._training_batches()))

    def epochs_of_run(self) -> float:
        """Returns how often the run trains on each row, computed from `steps_of_run`."""
        batches = self.steps_of_run() * self.trainer.accumulate_grad_batches
        return batches / max(1, len(self._training_batches()))

    def largest_batch(self) -> tuple[int, int]:
        """Returns the most rows of a training batch and the most tokens of a row, after `setup`."""
        longest = int(self.sizes[0].max())
        if self.max_tokens is None:
            return self.batch_size, longest
        return -(-self.max_tokens // longest), longest

    @cached_property
    def cut(self) -> CutStep:
        """Cuts training steps into micro-batches; `cut_steps` limits their size."""
        return CutStep(pad=Pad(**self._collation))

    def cut_steps(
        self,
        costs: ActivationCosts,
        max_bytes: float,
        *,
        packed: bool,
        count: int | None,
        most_tokens: int | None,
    ) -> None:
        """Limits the micro-batches of training steps, see `CutStep`; called after `setup`."""
        pack = None
        if packed:
            longest = int(self.sizes[0].max())
            pack = Pack(**self._collation, max_rows=self.rows_per_step, longest=longest)
        limits = {"limit": BatchLimit(max_bytes), "count": count, "most_tokens": most_tokens}
        self.cut = replace(self.cut, pack=pack, costs=costs, **limits)

    def on_before_batch_transfer(
        self, batch: Batch | Sequence[Batch], dataloader_idx: int
    ) -> Batch | Sequence[Batch]:
        """Reports the rows that were dropped from `batch`.

        Raises:
            DataError: too many rows were dropped by now.
        """
        for micro_batch in micro_batches_of(batch):
            if micro_batch.dropped:
                name, rows = self._current_set(dataloader_idx)
                self._findings.add_dropped(name, rows, micro_batch.dropped, self._findings_writer)
        return batch

    def _require_test_rows(self, purpose: str) -> None:
        if not any(map(len, self.test.values())):
            raise DataError(
                f"the dataset has no rows to {purpose}: give data.test=FILE or data.validation=FILE"
            )

    def _open_training(self) -> None:
        opened: dict[str, OpenedDataset] = {}
        for name, dataset in self.datasets.items():
            opened[name] = dataset.open_training()
        self.measured = measured = self._measure(opened)
        sizes, validation_lengths = [], []
        for dataset in measured.values():
            sizes += dataset.sizes[:-1]
            validation_lengths.append(dataset.lengths[-1])
        self.sizes = np.concatenate(sizes, axis=1)
        self._validation_lengths = np.concatenate(validation_lengths)
        self.train = [rows for dataset in measured.values() for rows in dataset.stages]
        self.validation = Concat([dataset.validation for dataset in measured.values()])
        self._batch_sampler = None  # belongs to the rows opened before
        if not any(map(len, self.train)):
            raise DataError(
                f"no row is left to train on; {FILENAME} in the run folder gives the reasons"
            )

    def _measure(self, opened: Mapping[str, OpenedDataset]) -> dict[str, OpenedDataset]:
        """Measures all rows: rank 0 on all cores, then the other ranks from its cache."""
        if self._rank:
            self.trainer.strategy.barrier("rows are measured")
        workers, drop_bad = available_cores(), self.on_bad_image == "drop"
        measured: dict[str, OpenedDataset] = {}
        for name, rows in opened.items():
            dataset = self.datasets[name]
            measured[name] = dataset.measure(
                rows, self.processor, workers=workers, drop_bad=drop_bad
            )
        if self._world_size > 1 and not self._rank:
            self.trainer.strategy.barrier("rows are measured")
        for name, rows in measured.items():
            self._findings.add_measured(name or "data", rows, self._findings_writer)
        return measured

    def _training_batches(self) -> BatchSampler:
        """Returns the batch sampler of the training rows.

        Raises:
            DataError: a row has more than `max_tokens`.
        """
        if self._batch_sampler is not None:
            return self._batch_sampler
        lengths = self.sizes[0]
        if self.max_tokens is not None and lengths.max() > self.max_tokens:
            longest = Concat(self.train)[int(lengths.argmax())]
            raise DataError(
                f"{longest.where or 'data'}: row {longest.id!r} has {lengths.max()} tokens, "
                f"more than data.max_tokens={self.max_tokens}; raise it, or leave such rows out "
                f"with model.max_length={self.max_tokens} model.too_long=drop"
            )
        stages = [len(rows) for rows in self.train]
        if self.order == "mixed":
            stages = [sum(stages)]
        self._batch_sampler = BatchSampler(
            stages,
            batch_size=self.batch_size,
            lengths=lengths,
            group_by_length=self.group_by_length and not self.cuts_steps,
            max_tokens=self.max_tokens,
            packing=self.packing,
            seed=self.seed,
            rank=self._rank,
            world_size=self._world_size,
            batches_per_step=self.rows_per_step,
            position=partial(data_position, self.trainer) if self.trainer else None,
        )
        return self._batch_sampler

    def _prompt_loader(
        self, name: str, rows: Rows, indices: list[int] | None = None, *, sort: bool = True
    ) -> DataLoader:
        """Returns a loader of the prompts of `rows`, or of those at `indices`, to answer."""
        sizes = prompt_sizes(rows)
        order = np.arange(len(rows)) if indices is None else np.array(indices, dtype=np.int64)
        if sort and self.eval_batch_size != 1:
            order = order[by_length(sizes.lengths[order])]
            has_options = sizes.answers[order] == 0
            order = order[np.argsort(has_options, kind="stable")]  # they are answered separately
        return self._eval_loader(name, rows, order, sizes.lengths, sizes)

    def _eval_loader(
        self,
        name: str,
        rows: Rows,
        order: np.ndarray,
        lengths: np.ndarray,
        sizes: PromptSizes | None = None,
    ) -> DataLoader:
        """Returns a loader of `rows` in `order`: for answers with `sizes`, else for the loss."""
        # Each row goes to exactly one rank; none is repeated to fill up.
        of_rank = order[self._rank :: self._world_size]
        if not len(of_rank):
            return loader_without_rows(self.processor.pad_id)
        module = getattr(self.trainer, "lightning_module", None)
        self.plans[name] = plan = plan_batches(
            rows,
            of_rank,
            lengths,
            sizes,
            processor=self.processor,
            batch_size=self.eval_batch_size,
            choose=getattr(module, "rows_together", None),
        )
        is_prompt = sizes is not None
        collate = CutRows(
            pad=Pad(**self._collation, side="left" if is_prompt else "right"),
            limit=getattr(module, "evaluated_rows", None) or BatchLimit(),
            options_apart=is_prompt,
        )
        batching = {"batch_size": plan.batches.rows, "sampler": plan.indices}
        return self._loader(rows, collate, prompt=is_prompt, renumber=True, **batching)

    @property
    def _collation(self) -> dict[str, Any]:
        """The arguments of `Pad` and `Pack` that come from the processor."""
        processor = self.processor
        return {"pad_id": processor.pad_id, "collate_vision": processor.collate_vision}

    def _loader(
        self, rows: Rows, collate: Callable[[list[Any]], Any], **options: Any
    ) -> DataLoader:
        drop_bad = self.on_bad_image == "drop"
        options |= {"drop_bad": drop_bad, "num_workers": self.num_workers}
        return encoded_loader(rows, self.processor, collate, **options)

    def _current_set(self, dataloader_idx: int) -> tuple[str, int]:
        """Returns the name of the set that the trainer runs on, and the number of its rows."""
        trainer = self.trainer
        if trainer.validating or trainer.sanity_checking:
            return "validation", len(self.validation)
        if trainer.testing or trainer.predicting:
            name = self.test_names[dataloader_idx]
            return name, len(self.test[name])
        return "train", sum(map(len, self.train))

    @property
    def _findings_writer(self) -> FindingsWriter:
        if not self.trainer:
            return FindingsWriter()
        folder = Path(self.trainer.default_root_dir)
        return FindingsWriter(folder=folder, rank=self._rank, world_size=self._world_size)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1
