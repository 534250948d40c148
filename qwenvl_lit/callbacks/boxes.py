"""Images with their boxes, as files to look at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning

from qwenvl_lit.callbacks.predictions import set_name
from qwenvl_lit.rendering.drawing import draw_prediction
from qwenvl_lit.rendering.text import images_with_boxes
from qwenvl_lit.types import Batch


class BoxDrawer(lightning.Callback):
    """Draws what `test_step` and `predict_step` return to `boxes/SET/INDEX.png` of the run folder.

    Predicted boxes are solid, expected ones dashed; images with neither are skipped. In a conversation with several images the file of
    image k > 0 is `INDEX_k.png`. Rank 0 draws its share of the rows.

    Args:
        limit: images of each set, the first ones.
    """

    def __init__(self, limit: int = 16):
        self.limit = limit
        self._drawn: Counter[str] = Counter()

    def on_test_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._drawn.clear()

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
                if self._drawn[name] < self.limit:
                    folder.mkdir(parents=True, exist_ok=True)
                    further = f"_{image}" if image else ""
                    draw_prediction(prediction, image).save(
                        folder / f"{prediction.conversation.index:06d}{further}.png"
                    )
                    self._drawn[name] += 1

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
