"""Predictions as json lines, in the order of the dataset, from one process or several."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning

from qwenvl_lit.types import (
    Batch,
    Box,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Part,
    Prediction,
)

FILENAME = "predictions.jsonl"


def set_name(trainer: lightning.Trainer, dataloader_idx: int) -> str:
    """Which of the datamodule's sets a test or predict loader reads; "test" or "predict" without a datamodule that names them."""
    names = getattr(trainer.datamodule, "test_names", None)  # type: ignore[attr-defined]  # Lightning sets it outside the class
    return names[dataloader_idx] if names else "predict" if trainer.predicting else "test"


def readable(parts: Iterable[Part]) -> str:
    """Text with `<img>name</img>` for an image, and an object as its label and its boxes.

    >>> readable(["Where is ", GroundedObject(label="the dog", boxes=(Box(x0=1, y0=2, x1=3.5, y1=4),)), "?"])
    'Where is the dog (1, 2, 3.5, 4)?'
    """
    pieces = []
    for part in parts:
        if isinstance(part, ImageSource):
            pieces.append(f"<img>{part.name}</img>")
        elif isinstance(part, GroundedObject):
            boxes = [
                f"({', '.join(f'{value:g}' for value in numbers)})" for numbers in box_numbers(part)
            ]
            pieces.append(" ".join(([part.label] if part.label else []) + boxes))
        else:
            pieces.append(part)
    return "".join(pieces)


def box_numbers(obj: GroundedObject) -> list[list[float]]:
    """Each box as [x0, y0, x1, y1], each quad as its four x, y in turn, in their own frame, to a hundredth."""
    regions = [
        (b.x0, b.y0, b.x1, b.y1) if isinstance(b, Box) else [v for point in b.points for v in point]
        for b in obj.boxes
    ]
    return [[round(value, 2) for value in numbers] for numbers in regions]


def prompt_text(conversation: Conversation) -> str:
    """What the model was asked. A single turn stands alone, several follow each other on lines that begin with the role."""
    turns = conversation.prompt().turns
    if len(turns) == 1:
        return readable(turns[0].parts)
    return "\n".join(f"{turn.role}: {readable(turn.parts)}" for turn in turns)


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


def merge_parts(parts: Sequence[Path], target: Path) -> int:
    """Join the files of all ranks into `target`, sorted by set (as first met) and index, each row once; then remove them.

    Returns the number of rows. `target` is replaced in one go: it never holds half of them.

    Raises:
        FileNotFoundError: a rank's file is not there, as when the ranks do not share a file system.
    """
    rows: dict[tuple[int, int], str] = {}
    order: dict[str, int] = {}
    for part in parts:
        with part.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                place = order.setdefault(row["set"], len(order))
                rows[place, row["index"]] = line
    unfinished = target.with_name(target.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(rows[key] for key in sorted(rows))
    os.replace(unfinished, target)
    for part in parts:
        part.unlink()
    return len(rows)


def earlier_answers(folder: Path, filename: str = FILENAME) -> dict[str, dict[int, dict[str, Any]]]:
    """The rows that a run in `folder` has answered, by set and index, whether it came to its end or was interrupted by whatever means.

    Raises:
        DataError: there is no file of predictions.
    """
    name = Path(filename)
    files = [
        file
        for file in (folder / name, *sorted(folder.glob(f"{name.stem}.rank*{name.suffix}")))
        if file.exists()
    ]
    if not files:
        raise DataError(
            f"answered={folder}: there is no {filename} and no {name.stem}.rank0{name.suffix}; give the folder of a prediction"
        )
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n")[
            :-1
        ]:  # the last one may have been cut off; it is empty otherwise
            row = json.loads(line)
            found.setdefault(row["set"], {})[row["index"]] = row
    return found


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
        target = Path(trainer.default_root_dir, self.filename)
        return target.with_name(f"{target.stem}.rank{rank}{target.suffix}")

    def _start(self, trainer: lightning.Trainer) -> None:
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("")
        if self.answered and trainer.is_global_zero:
            earlier = earlier_answers(Path(self.answered), self.filename)
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
            merge_parts(parts, Path(trainer.default_root_dir, self.filename))

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
