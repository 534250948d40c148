"""Draws predicted and expected boxes on images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.bounds import check_number
from qwenvl_lit.callbacks.predictions import set_name
from qwenvl_lit.rendering.drawing import draw_prediction
from qwenvl_lit.rendering.text import images_with_boxes
from qwenvl_lit.types import Batch, Prediction


class BoxDrawer(lightning.Callback):
    """Writes images with the boxes of answers to `boxes/SET/INDEX.png` in the run folder.

    SET is the name of the test set, and INDEX the index of the row. In a conversation with several
    images, the file of image k > 0 is `INDEX_k.png`. Predicted boxes are solid, and expected boxes
    are dashed. Images without boxes are skipped. The answers are those of rank 0.

    Args:
        limit: the maximum number of images per test set.
    """

    def __init__(self, limit: int = 16):
        check_number("callbacks.boxes.limit", limit, least=0, whole=True)
        self.limit = limit
        self._counts: Counter[str] = Counter()  # number of images drawn so far, by test set

    def on_test_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._counts.clear()

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # Sequence[Prediction]
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero:
            return
        name = set_name(trainer, dataloader_idx)
        folder = Path(trainer.default_root_dir, "boxes", name)
        for prediction in outputs:
            for image in images_with_boxes(prediction):
                if self._counts[name] < self.limit:
                    self._counts[name] += 1
                    _save(prediction, image, folder)

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end


def _save(prediction: Prediction, image: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f"_{image}" if image else ""
    file = folder / f"{prediction.conversation.index:06d}{suffix}.png"
    with atomic_file(file) as unfinished:
        draw_prediction(prediction, image).save(unfinished, "PNG")
