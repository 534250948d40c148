"""A callback of your own: writes the longest answers of a test to a file of the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lightning

from qwenvl_lit.types import Batch, Prediction


class LongAnswers(lightning.Callback):
    """Writes `long_answers.jsonl`, the longest answer first.

    In a run with several processes, these are the answers of rank 0.

    Args:
        count: number of answers.
    """

    def __init__(self, count: int = 10):
        self.count = count
        self.predictions: list[Prediction] = []

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Sequence[Prediction],
        batch: Sequence[Batch],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.predictions += outputs
        self.predictions.sort(key=lambda prediction: -len(prediction.text))
        del self.predictions[self.count :]

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        lines = []
        for prediction in self.predictions:
            row = {
                "id": prediction.conversation.id,
                "prediction": prediction.text,  # in the markup of the model
                "reference": prediction.reference,  # None for a row without an answer
                "tokens": prediction.tokens,
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        file = Path(trainer.default_root_dir, "long_answers.jsonl")
        file.write_text("".join(lines), encoding="utf-8")
