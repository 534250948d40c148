"""RefCOCO, RefCOCO+ and RefCOCOg: the question is a phrase, the answer the box of its object."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwenvl_lit.data.readers.coco import check_texts, only, read_json
from qwenvl_lit.data.readers.drafts import ImageReference
from qwenvl_lit.data.readers.files import check_is_file
from qwenvl_lit.data.readers.layouts import referring_draft
from qwenvl_lit.data.readers.prompts import REFERRING_PROMPT, fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, conversation_from
from qwenvl_lit.data.readers.sources import open_source, read_rows
from qwenvl_lit.types import Conversation, DataError

# What the unpickler raises for broken files.
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,
)


def read_refcoco(
    source: str, read_options: ReadOptions = DEFAULT, *, images: str
) -> Sequence[Conversation]:
    """Returns referring expressions from the published pickle files or Qwen-VL's jsonl files.

    Args:
        source: a pickle file, with `instances.json` beside it, and one of its splits, as in
            `refs(unc).p:train`; or a jsonl file, as in `read_rows`, whose rows name their images.
        images: folder of COCO's train2014 images within `read_options.root`.
    """
    pickled = re.fullmatch(r"(.*\.p):(\w+)(#\d+)?", source, re.DOTALL)
    if not pickled:
        return read_rows(source, read_options)
    file, split, count = pickled.groups()
    return open_source(
        file + (count or ""),
        read_options,
        lambda path: ReferringExpressions(path, split, read_options, images=images),
    )


class ReferringExpressions(Sequence[Conversation]):
    """The sentences of one split. Each is a row, and its `sent_id` is the row's id.

    Raises:
        DataError: a file is not in the published format or has no such split, or the image or box
            of a row cannot be used.
    """

    def __init__(self, file: Path, split: str, read_options: ReadOptions = DEFAULT, *, images: str):
        self.file = file
        self.split = split
        self.read_options = read_options
        self.images = images
        fill_prompt(read_options.prompt or REFERRING_PROMPT, image="", question="")  # check it now
        instances = file.with_name("instances.json")
        self.files = (file, instances)
        content = read_json(instances, only("images", "annotations", "id", "file_name", "bbox"))
        expressions = read_plain_pickle(file)
        try:
            self._rows = _rows_of(expressions, split, content)
            check_texts(text for _, sentence, name, _ in self._rows for text in (sentence, name))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{file} and {instances.name} are not in the published format: {error!r:.200}; "
                f"expected [{{ann_id, image_id, split, sentences: [{{sent_id, sent}}]}}] and "
                f"{{images: [{{id, file_name}}], annotations: [{{id, bbox}}]}}"
            ) from None
        if not self._rows:
            splits = sorted({str(expression["split"]) for expression in expressions})
            raise DataError(f"{file} has no split {split!r}; it has {', '.join(splits)}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        sentence_id, sentence, name, box = self._rows[index]
        image = ImageReference(f"{self.images}/{name}")
        try:
            return conversation_from(
                referring_draft(image, sentence, box, self.read_options.prompt),
                row_id=str(sentence_id),
                root=self.read_options.root or self.file.parent,
                index=index,
                columns={},
                where=str(self.file),
                read_options=self.read_options,
            )
        except DataError as error:
            raise error.in_row(str(self.file), str(sentence_id)) from None


def _rows_of(
    expressions: Sequence[Mapping[str, Any]], split: str, instances: Mapping[str, Any]
) -> list[tuple[Any, str, str, list[float]]]:
    """Returns (sentence id, sentence, name of the image, corners of the box) of a split's rows."""
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    annotations = [each for each in instances["annotations"] if "bbox" in each]
    boxes = {annotation["id"]: annotation["bbox"] for annotation in annotations}
    rows = []
    for expression in expressions:
        if expression["split"] != split:
            continue
        for sentence in expression["sentences"]:
            name = names[expression["image_id"]]
            box = _corners(boxes[expression["ann_id"]])
            rows.append((sentence["sent_id"], sentence["sent"], name, box))
    return rows


def _corners(box: Sequence[float]) -> list[float]:
    """Returns [x1, y1, x2, y2] of [x, y, width, height].

    Rounded to two digits, as the boxes are published: an unrounded sum can end just outside the
    image.
    """
    x, y, width, height = box
    return [x, y, round(x + width, 2), round(y + height, 2)]


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text, lists and mappings only: other pickles could run code of their own."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")


def read_plain_pickle(file: Path) -> Any:
    """Returns the content of a pickle of plain values, written by Python 2 or 3.

    Raises:
        DataError: the file cannot be read, or holds other values.
    """
    check_is_file(file)
    try:
        with file.open("rb") as stream:
            return _PlainUnpickler(stream, encoding="utf-8").load()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; check the path") from None
    except _BROKEN_PICKLE as error:
        raise DataError(f"{file} is not the published pickle file: {error}") from None
