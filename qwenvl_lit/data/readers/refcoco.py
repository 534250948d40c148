"""RefCOCO, RefCOCO+ and RefCOCOg: a phrase asks, the box of what it refers to answers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwenvl_lit.data.readers.coco import check_texts, only, read_json
from qwenvl_lit.data.readers.layouts import Draft
from qwenvl_lit.data.readers.prompts import REFERRING_PROMPT, ask
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, conversation_from
from qwenvl_lit.data.readers.sources import open_source, read_rows
from qwenvl_lit.types import Conversation, DataError


def read_refcoco(
    source: str, read_options: ReadOptions = DEFAULT, *, images: str
) -> Sequence[Conversation]:
    """Referring expressions as published: `refs(unc).p:train`, or the jsonl files of Qwen-VL's evaluation, which name their images.

    Args:
        source: a pickle file and one of its splits, `instances.json` beside it; or as in `read_rows`.
        images: folder of COCO's train2014 images within `read_options.root`.
    """
    found = re.fullmatch(r"(.*\.p):(\w+)(#\d+)?", source, re.DOTALL)
    if not found:
        return read_rows(source, read_options)
    file, split, count = found.groups()
    return open_source(
        file + (count or ""),
        read_options,
        lambda path: ReferringExpressions(path, split, read_options, images=images),
    )


class ReferringExpressions(Sequence[Conversation]):
    """The sentences of one split, each a row; its `sent_id` is the row's id.

    Raises:
        DataError: a file is not as published, has no such split, or a row's image or box is not usable.
    """

    def __init__(self, file: Path, split: str, read_options: ReadOptions = DEFAULT, *, images: str):
        self.file = file
        self.part = split
        self.read_options = read_options
        self.images = images
        self._prompt = read_options.prompt or REFERRING_PROMPT
        ask(self._prompt, image="", question="")
        instances = file.with_name("instances.json")
        self.files = (file, instances)
        content = read_json(instances, only("images", "annotations", "id", "file_name", "bbox"))
        references = read_plain_pickle(file)
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            boxes = {
                annotation["id"]: annotation["bbox"]
                for annotation in content["annotations"]
                if "bbox" in annotation
            }
            chosen = [reference for reference in references if reference["split"] == split]
            self._rows = [
                (
                    sentence["sent_id"],
                    sentence["sent"],
                    names[reference["image_id"]],
                    _corners(boxes[reference["ann_id"]]),
                )
                for reference in chosen
                for sentence in reference["sentences"]
            ]
            check_texts(text for _, sentence, name, _ in self._rows for text in (sentence, name))
            if not self._rows:
                known = sorted({reference["split"] for reference in references})
                raise DataError(f"{file} has no split {split!r}; it has {', '.join(known)}")
        except (KeyError, TypeError, AttributeError, ValueError) as fault:
            if isinstance(fault, DataError):
                raise
            raise DataError(
                f"{file} and {instances.name} are not as published: {fault!r}; expected [{{ann_id, image_id, split, sentences: [{{sent_id, "
                f"sent}}]}}] and {{images: [{{id, file_name}}], annotations: [{{id, bbox}}]}}"
            ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Conversation:
        place = range(len(self))[place]
        id, sentence, name, box = self._rows[place]
        try:
            question = ask(
                self._prompt, image=f"<img>{self.images}/{name}</img>", question="<ref-object>"
            )
            thing = {"caption": sentence, "bbox": box, "bbox_type": "real"}
            draft = Draft(
                turns=[("user", "".join(map(str, question))), ("assistant", "<bbox>")],
                objects=[thing],
            )
            root = self.read_options.root or self.file.parent
            return conversation_from(
                draft,
                id=str(id),
                root=root,
                index=place,
                columns={},
                where=str(self.file),
                read_options=self.read_options,
            )
        except DataError as fault:
            raise type(fault)(f"{self.file}: sentence {id}: {fault}") from None


def _corners(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [
        x,
        y,
        round(x + width, 2),
        round(y + height, 2),
    ]  # published with two digits; a sum may end just outside its image


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text, lists and mappings; a pickle that names anything else could run code of its own."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")


def read_plain_pickle(file: Path) -> Any:
    """The content of a pickle of plain values, of Python 2 or 3.

    Raises:
        DataError: it cannot be read, or holds anything else.
    """
    try:
        with file.open("rb") as stream:
            return _PlainUnpickler(stream, encoding="utf-8").load()
    except OSError as fault:
        raise DataError(f"{file} cannot be read: {fault.strerror}; check the path") from None
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
    ) as fault:
        raise DataError(f"{file} is not the published pickle file: {fault}") from None
