"""A module with one weight whose answers are columns of its data.

It is enough to run Lightning's loops around metrics and callbacks.
"""

from collections.abc import Mapping, Sequence

import lightning
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.types import (
    Batch,
    Box,
    Conversation,
    GroundedObject,
    ImageSource,
    Part,
    Prediction,
    Turn,
)


def grounded(label: str, x0: float, y0: float, x1: float, y1: float, **options) -> GroundedObject:
    return GroundedObject(label=label, boxes=(Box(x0=x0, y0=y0, x1=x1, y1=y1, **options),))


def conversation(
    index: int,
    *,
    says: str = "",
    question: Sequence[Part] = ("What?",),
    answer: Sequence[Part] = ("yes",),
) -> Conversation:
    """A question about a 64 x 64 image, to which `ToyTask` answers `says`."""
    image = ImageSource(Image.new("RGB", (64, 64), (40, 60 + index, 80)))
    turns = (
        Turn(role="user", parts=(image, *question)),
        Turn(role="assistant", parts=tuple(answer)),
    )
    return Conversation(id=f"row {index}", index=index, turns=turns, columns={"says": says})


def batch_of(rows: Sequence[Conversation]) -> Batch:
    """Rows of two tokens and one of padding; one token is supervised."""
    ids = torch.ones(len(rows), 3, dtype=torch.int64)
    return Batch(
        conversations=tuple(rows),
        input_ids=ids,
        labels=torch.tensor([[-100, 1, -100]] * len(rows)),
        attention_mask=torch.tensor([[1, 1, 0]] * len(rows)),
        position_ids=None,
        lengths=(2,) * len(rows),
        vision_positions=torch.zeros(0, dtype=torch.int64),
        target_positions=torch.arange(len(rows)) * 3,
        vision={},
    )


class ToyData(lightning.LightningDataModule):
    """Batches of two rows; with two ranks, each rank has every other row of each set."""

    def __init__(
        self,
        rows: Sequence[Conversation] = (),
        test: Mapping[str, Sequence[Conversation]] | None = None,
    ):
        super().__init__()
        self.rows = rows
        self.test = dict(test or {})
        # Otherwise Lightning refuses a rank without rows.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def test_names(self) -> list[str]:
        return list(self.test)

    def _loader(self, rows: Sequence[Conversation]) -> DataLoader:
        own_rows = rows[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own_rows, batch_size=2, collate_fn=batch_of)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.rows)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader(self.rows), self._loader(self.rows)]

    def test_dataloader(self) -> list[DataLoader]:
        return [self._loader(rows) for rows in self.test.values()]

    predict_dataloader = test_dataloader


class ToyTask(lightning.LightningModule):
    """Its loss is the square of its weight, initially 1; each step halves the learning rate."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.scores = torch.nn.ModuleDict()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.weight.square().sum()
        self.log("train/loss", loss, batch_size=2)
        return loss

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[Prediction] | None:
        return answers(batch) if dataloader_idx == 1 else None

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.weight.detach().square().sum())

    def on_test_epoch_start(self) -> None:
        self.scores = torch.nn.ModuleDict(
            {name: ExactMatch() for name in self.trainer.datamodule.test_names}
        )

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Prediction]:
        predictions = answers(batch)
        self.scores[self.trainer.datamodule.test_names[dataloader_idx]].update(predictions)
        return predictions

    def on_test_epoch_end(self) -> None:
        for name, metric in self.scores.items():
            self.log(f"{name}/exact_match", metric.compute())
            self.log(f"{name}/rows", float(metric.count))

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[Prediction]:
        return answers(batch)


def answers(batch: Batch) -> list[Prediction]:
    """Answers with the column `says` of the rows, and a box around the left half of the image."""
    predictions = []
    for row in batch.conversations:
        text = row.columns["says"]
        parts = (text, grounded("half", 0, 0, 32, 64))
        predictions.append(Prediction(conversation=row, text=text, parts=parts, reference="yes"))
    return predictions


def trainer(folder, *callbacks: lightning.Callback, **options) -> lightning.Trainer:
    """A trainer on the CPU that writes nothing by itself."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    options = {**defaults, **options}
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)
