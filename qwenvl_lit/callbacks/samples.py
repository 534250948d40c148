"""A few validation answers on one sheet, at each validation: what the model has learned so far, at a glance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
from PIL import Image, ImageDraw

from qwenvl_lit.rendering.drawing import draw_prediction, font, has_han
from qwenvl_lit.rendering.text import images_with_boxes, readable
from qwenvl_lit.types import Batch, ImageSource, Prediction

COLUMNS = 4
CELL_PX = 320  # width of a cell and largest side of its image
MARGIN_PX = 12
TEXT_PX = 14
MOST_LINES = 6  # of each text
MOST_LETTERS = 80  # of a line
RIGHT, WRONG, PLAIN = "#00695c", "#b3261e", "#333333"


class SampleVisualiser(lightning.Callback):
    """Writes `samples/step_STEP.png` to the run folder: the first `count` answers that `validation_step` returned, as `contact_sheet`.

    Validation steps that return None (no generation) are passed over. Rank 0 shows its share of the rows.
    """

    def __init__(self, count: int = 8):
        self.count = count
        self._predictions: list[Prediction] = []

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._predictions = []

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # Sequence[Prediction] | None
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._predictions += (outputs or ())[: self.count - len(self._predictions)]

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and self._predictions:
            folder = Path(trainer.default_root_dir, "samples")
            folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(self._predictions).save(folder / f"step_{trainer.global_step:06d}.png")


def contact_sheet(predictions: Sequence[Prediction]) -> Image.Image:
    """Four to a row: image with predicted (solid) and expected (dashed) boxes, question, answer, expected answer.

    The answer is green if it equals the expected one or a reference, red if not. Long texts end in an ellipsis.
    """
    cells = [_cell(prediction) for prediction in predictions]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) + MARGIN_PX for row in rows]
    columns = min(COLUMNS, len(cells))
    sheet = Image.new(
        "RGB", (columns * (CELL_PX + MARGIN_PX) + MARGIN_PX, sum(heights) + MARGIN_PX), "white"
    )
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (MARGIN_PX + column * (CELL_PX + MARGIN_PX), top))
        top += height
    return sheet


def _cell(prediction: Prediction) -> Image.Image:
    conversation = prediction.conversation
    image = None
    if conversation.images:
        shown = next(iter(images_with_boxes(prediction)), 0)
        image = draw_prediction(prediction, shown, largest_side_px=CELL_PX)
    answers = [
        text for text in (prediction.reference, *conversation.references) if text is not None
    ]
    right = prediction.text.strip() in {text.strip() for text in answers}
    question = readable(
        part for part in conversation.prompt().turns[-1].parts if not isinstance(part, ImageSource)
    )
    verdict = PLAIN if not answers else RIGHT if right else WRONG
    texts = [
        (f"Question: {question.strip()}", PLAIN),
        (f"Answer: {prediction.text.strip()}", verdict),
    ]
    if answers:
        texts.append((f"Expected: {answers[0].strip()}", PLAIN))
    lines = [(line, colour) for text, colour in texts for line in _wrap(text)]
    line_px = TEXT_PX + 5
    top = image.height + 6 if image else 0
    cell = Image.new("RGB", (CELL_PX, top + line_px * len(lines)), "white")
    if image:
        cell.paste(image, ((CELL_PX - image.width) // 2, 0))
    draw = ImageDraw.Draw(cell)
    for number, (line, colour) in enumerate(lines):
        draw.text(
            (0, top + number * line_px), line, fill=colour, font=font(TEXT_PX, han=has_han(line))
        )
    return cell


def _wrap(text: str) -> list[str]:
    """At most six lines of the cell's width, broken at spaces or, where there are none, anywhere."""
    lines = list(islice(_lines(text), MOST_LINES + 1))
    return (
        lines
        if len(lines) <= MOST_LINES
        else [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1][:-1] + "…"]
    )


def _lines(text: str) -> Iterator[str]:
    letters = font(TEXT_PX, han=has_han(text))
    for rest in text.splitlines():
        while letters.getlength(rest) > CELL_PX:
            fitting = next(
                end
                for end in range(min(len(rest), MOST_LETTERS), 0, -1)
                if letters.getlength(rest[:end]) <= CELL_PX
            )
            space = rest.rfind(" ", 1, fitting + 1)
            end = space if space > 0 else fitting
            yield rest[:end]
            rest = rest[end:].lstrip()
        yield rest
