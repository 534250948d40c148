"""A layout of your own: {"photo": "a.png", "defect": "a scratch", "xyxy": [8, 8, 40, 20]}."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwenvl_lit.data.readers.drafts import Draft, ImageReference, Placeholder
from qwenvl_lit.data.readers.files import RowFile
from qwenvl_lit.data.readers.rows import ReadOptions, conversation_from
from qwenvl_lit.data.readers.sources import open_source
from qwenvl_lit.types import Conversation, DataError


def read_defects(source: str, read_options: ReadOptions) -> Sequence[Conversation]:
    """Returns the rows of the files that `source` names: a path or a pattern, perhaps with #N."""
    return open_source(source, read_options, lambda file: DefectRows(file, read_options))


class DefectRows(Sequence[Conversation]):
    """The rows of a json, jsonl, csv or tsv file. A row is read when it is fetched."""

    def __init__(self, file: Path, read_options: ReadOptions):
        self.rows = RowFile(file, read_options.cache)
        self.root = read_options.root or file.parent
        self.read_options = read_options

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        where, row_id = self.rows.where(index), self.rows.name_of(index)
        try:
            return conversation_from(
                draft_of(self.rows[index]),
                row_id=row_id,
                root=self.root,
                index=index,
                columns={},
                where=where,
                read_options=self.read_options,
            )
        except DataError as error:
            raise error.in_row(where, row_id) from None


def draft_of(row: dict) -> Draft:
    """Returns the turns of a row, whose text, image and box the package then reads and checks."""
    for key in ("photo", "defect", "xyxy"):
        if row.get(key) is None:
            raise DataError(f"has no `{key}`; expected photo, defect and xyxy")
    found = {"caption": row["defect"], "bbox": row["xyxy"], "bbox_type": "real", "image": 0}
    question = (ImageReference(row["photo"]), "Find the defect.")
    answer = (Placeholder.LABEL, Placeholder.BOXES)
    return Draft(turns=[("user", question), ("assistant", answer)], objects=[found])
