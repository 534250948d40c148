"""Draws a sheet of example answers at each validation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
from PIL import Image, ImageDraw, ImageFont

from qwenvl_lit.atomic import atomic_file
from qwenvl_lit.bounds import check_number
from qwenvl_lit.rendering.drawing import draw_prediction
from qwenvl_lit.rendering.fonts import fitting_characters, font_for, shortened, writable
from qwenvl_lit.rendering.text import images_with_boxes, readable
from qwenvl_lit.types import Batch, Conversation, ImageSource, Prediction

COLUMNS = 4
CELL_PX = 320  # width of a cell, and maximum side of its image
MARGIN_PX = 12
TEXT_PX = 14
LINE_PX = TEXT_PX + 5
MAX_LINES = 6  # lines of each text
MAX_CHARACTERS = 1000  # characters of each text that are looked at
BREAK = re.compile(" |(?=<ref>)|(?<=</box>)(?=<)")  # where a line may end
CORRECT, WRONG, PLAIN = "#00695c", "#b3261e", "#333333"  # text colors

ColoredText = tuple[str, str]  # text and color
Font = ImageFont.FreeTypeFont


class SampleVisualiser(lightning.Callback):
    """Writes the first answers of each validation to `samples/step_STEP.png` in the run folder.

    `contact_sheet` draws the answers. Validation steps without generation, which return None, are
    skipped. The answers are those of rank 0.

    Args:
        count: the number of answers on a sheet.
    """

    def __init__(self, count: int = 8):
        check_number("callbacks.samples.count", count, least=0, whole=True)
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
            with atomic_file(folder / f"step_{trainer.global_step:06d}.png") as unfinished:
                contact_sheet(self._predictions).save(unfinished, "PNG")


def contact_sheet(predictions: Sequence[Prediction]) -> Image.Image:
    """Draws answers in rows of four, each with image, question, answer and expected answer.

    Predicted boxes are solid, and expected boxes are dashed. An answer is green if it equals the
    expected answer or a reference, and otherwise red. Long texts are cut and end in an ellipsis.
    """
    cells = [_cell(prediction) for prediction in predictions]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [_height(row) for row in rows]
    width = min(COLUMNS, len(cells)) * (CELL_PX + MARGIN_PX) + MARGIN_PX
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN_PX), "white")
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN_PX
        for cell in row:
            sheet.paste(cell, (left, top))
            left += CELL_PX + MARGIN_PX
        top += height
    return sheet


def _height(row: Sequence[Image.Image]) -> int:
    """Returns the height of a row of cells, including the margin below it."""
    return max(cell.height for cell in row) + MARGIN_PX


def _cell(prediction: Prediction) -> Image.Image:
    image, top = None, 0
    if prediction.conversation.images:
        boxed = images_with_boxes(prediction)
        index = boxed[0] if boxed else 0
        image = draw_prediction(prediction, index, largest_side_px=CELL_PX)
        top = image.height + 6
    lines: list[tuple[str, str, Font]] = []
    for text, color in _texts(prediction):
        text = "\n".join(map(writable, text[:MAX_CHARACTERS].splitlines()))
        font = font_for(text, TEXT_PX)
        for line in _wrap(text, font):
            lines.append((line, color, font))
    cell = Image.new("RGB", (CELL_PX, top + LINE_PX * len(lines)), "white")
    if image:
        cell.paste(image, ((CELL_PX - image.width) // 2, 0))
    draw = ImageDraw.Draw(cell)
    for index, (line, color, font) in enumerate(lines):
        draw.text((0, top + index * LINE_PX), line, fill=color, font=font)
    return cell


def _texts(prediction: Prediction) -> list[ColoredText]:
    """Returns question, answer and, if it exists, expected answer, each with its color."""
    conversation = prediction.conversation
    answer = prediction.text.strip()
    references = [text.strip() for text in conversation.references]
    if prediction.reference is not None:
        references.insert(0, prediction.reference.strip())
    color = PLAIN
    if references:
        color = CORRECT if answer in references else WRONG
    texts = [(f"Question: {_question(conversation)}", PLAIN), (f"Answer: {answer}", color)]
    if references:
        texts.append((f"Expected: {references[0]}", PLAIN))
    return texts


def _question(conversation: Conversation) -> str:
    """Returns the text of the last turn of the prompt."""
    parts = conversation.prompt().turns[-1].parts
    return readable(part for part in parts if not isinstance(part, ImageSource)).strip()


def _wrap(text: str, font: Font) -> list[str]:
    """Splits a text into at most `MAX_LINES` lines. A text that is cut ends in an ellipsis."""
    lines = list(_lines(text, font))
    if len(lines) > MAX_LINES:
        lines = lines[:MAX_LINES]
        lines[-1] = shortened(lines[-1] + "...", font, CELL_PX)
    return lines


def _lines(text: str, font: Font) -> Iterator[str]:
    """Yields lines that fit into a cell. A word is split only if it is longer than a line."""
    for paragraph in text.splitlines():
        rest = paragraph
        while font.getlength(rest) > CELL_PX:
            end = fitting_characters(rest, font, CELL_PX)
            breaks = [found.start() for found in BREAK.finditer(rest, 1, end + 1)]
            if breaks:
                end = breaks[-1]
            yield rest[:end].rstrip()
            rest = rest[end:].lstrip()
        yield rest
