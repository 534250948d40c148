"""Predictions as json lines, in the order of the dataset, from one process or several."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning

from qwenvl_lit.data.predictions import FILENAME, answered_rows, merge_rank_files, rank_file
from qwenvl_lit.rendering.text import box_numbers, prompt_text
from qwenvl_lit.types import Batch, GroundedObject, Prediction


def set_name(trainer: lightning.Trainer, dataloader_idx: int) -> str:
    """Which of the datamodule's sets a test or predict loader reads; "test" or "predict" without a datamodule that names them."""
    names = getattr(trainer.datamodule, "test_names", None)  # type: ignore[attr-defined]  # Lightning sets it outside the class
    return names[dataloader_idx] if names else "predict" if trainer.predicting else "test"


def prediction_row(prediction: Prediction, set_name: str) -> dict[str, Any]:
    """A prediction as plain data, one line of `predictions.jsonl`.

    Boxes are in pixels of the image that the object names, counted from 0; `image` is null where the conversation has none, and boxes
    are then on the grid of 0..999. `frame` says which.
    """
    conversation = prediction.conversation
    placed = {"frame": "pixel"} if conversation.images else {"frame": "grid", "image": None}
    return {
        "set": set_name,
        "index": conversation.index,
        "id": conversation.id,
        "prompt": prompt_text(conversation),
        "images": [image.name for image in conversation.images],
        "prediction": prediction.text,
        "reference": prediction.reference,
        "references": list(conversation.references),
        "objects": [
            {"label": part.label, "boxes": box_numbers(part), "image": part.image, **placed}
            for part in prediction.parts
            if isinstance(part, GroundedObject)
        ],
        "columns": dict(conversation.columns),
    }


class PredictionWriter(lightning.Callback):
    """Writes what `test_step` and `predict_step` return, a list of `Prediction`, to a file of the run folder.

    Each rank writes `NAME.rank0.jsonl`, ... batch by batch, which is what an interrupted run leaves; at the end they become one file.

    Args:
        answered: the folder of an earlier prediction, whose rows are taken over.
    """

    def __init__(self, filename: str = FILENAME, answered: str | None = None):
        self.filename = filename
        self.answered = answered

    def _part(self, trainer: lightning.Trainer, rank: int) -> Path:
        return rank_file(Path(trainer.default_root_dir, self.filename), rank)

    def _start(self, trainer: lightning.Trainer) -> None:
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("")
        if self.answered and trainer.is_global_zero:
            earlier = answered_rows(Path(self.answered), self.filename)
            _write(part, (row for rows in earlier.values() for row in rows.values()))

    def _append(
        self, trainer: lightning.Trainer, predictions: Sequence[Prediction], dataloader_idx: int
    ) -> None:
        name = set_name(trainer, dataloader_idx)
        _write(
            self._part(trainer, trainer.global_rank),
            (prediction_row(prediction, name) for prediction in predictions),
        )

    def _finish(self, trainer: lightning.Trainer) -> None:
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero:
            parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
            merge_rank_files(parts, Path(trainer.default_root_dir, self.filename))

    def on_test_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._start(trainer)

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # Sequence[Prediction]
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._append(trainer, outputs, dataloader_idx)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._finish(trainer)

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Says how a prediction goes on, after Ctrl-C too, of which Lightning says nothing."""
        part = self._part(trainer, 0)
        if trainer.predicting and trainer.is_global_zero and part.exists() and part.stat().st_size:
            print(
                f"\nStopped; the same command with answered={part.parent} answers the other rows.",
                file=sys.stderr,
            )


def _write(part: Path, rows: Iterable[dict[str, Any]]) -> None:
    with part.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
