"""Predictions as lines of JSON in the order of the dataset, from one process or several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning

from qwenvl_lit.data.json_lines import append_json_lines
from qwenvl_lit.data.predictions import FILENAME, answered_rows, merge_rank_files, rank_file
from qwenvl_lit.rendering.text import box_numbers, prompt_text
from qwenvl_lit.stopping import Stopped, signals
from qwenvl_lit.types import Batch, GroundedObject, Prediction


def set_name(trainer: lightning.Trainer, dataloader_idx: int) -> str:
    """Returns the name of the set that a test or predict loader reads.

    Without a data module that names its sets it is "test" or "predict".
    """
    names = getattr(trainer.datamodule, "test_names", None)
    if names:
        return names[dataloader_idx]
    return "predict" if trainer.predicting else "test"


def prediction_row(prediction: Prediction, set_name: str) -> dict[str, Any]:
    """Returns a prediction as plain data, for a line of `predictions.jsonl`.

    `thoughts` is there only if the model wrote some.
    """
    conversation = prediction.conversation
    row = {
        "set": set_name,
        "index": conversation.index,
        "id": conversation.id,
        "prompt": prompt_text(conversation),
        "images": [image.name for image in conversation.images],
        "prediction": prediction.text,
        "reference": prediction.reference,
        "references": list(conversation.references),
        "objects": object_rows(prediction),
        "columns": dict(conversation.columns),
    }
    if prediction.thoughts is not None:
        row["thoughts"] = prediction.thoughts
    return row


def object_rows(prediction: Prediction) -> list[dict[str, Any]]:
    """Returns the objects of a prediction as plain data.

    Boxes are in pixels of the image that their object names by its index. If the conversation has
    no image, `image` is null and boxes are in the frame of the answer; `frame` tells which.
    """
    objects = []
    for part in prediction.parts:
        if isinstance(part, GroundedObject):
            boxes = {"label": part.label, "boxes": box_numbers(part)}
            if prediction.conversation.images:
                objects.append({**boxes, "image": part.image, "frame": "pixel"})
            else:
                frame = part.boxes[0].frame if part.boxes else "grid"
                objects.append({**boxes, "image": None, "frame": frame})
    return objects


class PredictionWriter(lightning.Callback):
    """Writes the predictions of `test_step` and `predict_step` to a file of the run folder.

    Each rank appends to a file of its own, `NAME.rank0.jsonl` and so on, batch by batch. At the end
    the files are merged; after an interrupt they remain. `predict` continues from them with
    `answered`; `test` starts again in the same folder.

    Args:
        answered: the folder of an earlier prediction whose rows are taken over.
    """

    def __init__(self, filename: str = FILENAME, answered: str | None = None):
        self.filename = filename
        self.answered = answered

    def on_test_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        file = self._rank_file(trainer, trainer.global_rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        if trainer.is_global_zero:
            self._remove_other_files(trainer)
        if self.answered and trainer.is_global_zero:
            earlier = answered_rows(Path(self.answered), self.filename)
            for rows in earlier.values():
                append_json_lines(file, rows.values())
        signals.kept = _how_to_continue(trainer)

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # Sequence[Prediction]
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        name = set_name(trainer, dataloader_idx)
        rows = [prediction_row(prediction, name) for prediction in outputs]
        append_json_lines(self._rank_file(trainer, trainer.global_rank), rows)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero:
            files = [self._rank_file(trainer, rank) for rank in range(trainer.world_size)]
            merge_rank_files(files, Path(trainer.default_root_dir, self.filename))

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Prints how a failed prediction is continued; a command prints it after a signal."""
        if isinstance(exception, Stopped) or not (trainer.predicting and trainer.is_global_zero):
            return
        file = self._rank_file(trainer, 0)
        if file.exists() and file.stat().st_size:
            print(f"\nStopped. {_how_to_continue(trainer)}", file=sys.stderr)

    def _remove_other_files(self, trainer: lightning.Trainer) -> None:
        """Removes what an interrupted test with more processes has left in the folder."""
        own_files = {self._rank_file(trainer, rank) for rank in range(trainer.world_size)}
        pattern = rank_file(Path(self.filename), "*").name
        for file in set(Path(trainer.default_root_dir).glob(pattern)) - own_files:
            file.unlink()

    def _rank_file(self, trainer: lightning.Trainer, rank: int) -> Path:
        return rank_file(Path(trainer.default_root_dir, self.filename), rank)


def _how_to_continue(trainer: lightning.Trainer) -> str:
    folder = trainer.default_root_dir
    if trainer.predicting:
        return (
            f"The same command with answered={folder}, and another hydra.run.dir= if it has one, "
            f"answers the other rows."
        )
    return f"The same command, also with hydra.run.dir={folder}, starts the test again."
