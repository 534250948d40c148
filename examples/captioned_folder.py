"""A reader of your own: a folder in which each image NAME.png has its caption in NAME.txt."""

from __future__ import annotations

from pathlib import Path

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn


def read_captions(source: str, read_options: ReadOptions) -> list[Conversation]:
    """Returns a row for each image.

    Args:
        source: what `data.train`, `data.validation` or `data.test` names: a folder.
        read_options: the settings of the dataset, such as `prompt` and `exif`.

    Raises:
        DataError: the folder has no images, or an image has no caption.
    """
    images = sorted(Path(source).expanduser().glob("*.png"))
    if not images:
        raise DataError(f"{source} has no file *.png; name a folder with images and captions")
    question = read_options.prompt or "Describe the picture."
    rows = []
    for index, image in enumerate(images):
        caption = image.with_suffix(".txt")
        if not caption.exists():
            raise DataError(f"{image} has no caption; write it to {caption}")
        source_image = ImageSource(image, read_options.image_options)
        answer = caption.read_text(encoding="utf-8").strip()
        turns = (
            Turn(role="user", parts=(source_image, question)),
            Turn(role="assistant", parts=(answer,)),
        )
        row = Conversation(id=image.stem, turns=turns, index=index, where=str(image))
        rows.append(row)
    return rows
