"""Writes `findings.jsonl`: what is wrong with or unusual about rows, a line for each finding."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_lit.data.json_lines import append_json_lines
from qwenvl_lit.data.mixture import OpenedDataset
from qwenvl_lit.data.survey import Finding, Kind
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError, Dropped

FILENAME = "findings.jsonl"
# `Conversation.where`
_PLACE = re.compile(r"(.+?)(?::(\d+))?(?: \(row (\d+)(?:, row group \d+)?\))?", re.DOTALL)
Identity = tuple[str, str, str]  # set, kind and message of a finding
log = logging.getLogger(__name__)


def record(set_name: str, finding: Finding | Dropped) -> dict[str, Any]:
    """Returns a line of `findings.jsonl`. Keys without a value are None.

    - set: the name of the set.
    - kind: see `Kind`.
    - file, line: the file as the config names it, and the line on which the row begins or, if it
      is not JSON, of the error.
    - row: the number of the row in a JSON array or a parquet file, counted from 1.
    - id: the id of the row; for a row without one, its file and line as in predictions.
    - message: the finding in one line, as it is printed.
    """
    kind: Kind = "dropped"
    if isinstance(finding, Finding):
        kind, row_id, message = finding.kind, finding.id, finding.message
    else:
        row_id, message = finding.row_id, str(finding)
    file = line = row = None
    if place := _PLACE.fullmatch(finding.where):
        file, line, row = place.groups()
    return {
        "set": set_name,
        "kind": kind,
        "file": file,
        "line": line and int(line),
        "row": row and int(row),
        "id": row_id or None,
        "message": message,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class FindingsWriter:
    """Appends findings to the file of one rank.

    Rank 0 writes `findings.jsonl`, rank 1 `findings.rank1.jsonl`, and so on.
    """

    folder: Path | None = None  # the run folder; None: write nothing
    rank: int = 0
    world_size: int = 1

    @property
    def file(self) -> Path | None:
        if self.folder is None:
            return None
        file = self.folder / FILENAME
        return file.with_stem(f"{file.stem}.rank{self.rank}") if self.rank else file

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        if self.file is not None:
            append_json_lines(self.file, records)

    def listed(self) -> set[Identity]:
        """Returns the findings in the file: a run that is resumed makes the same ones again.

        Other lines are no findings: a killed process may have left half a line, and users may have
        added some. They stay in the file.
        """
        if self.file is None or not self.file.exists():
            return set()
        found = set()
        for line in self.file.read_bytes().split(b"\n"):
            with suppress(ValueError, RecursionError):  # not JSON
                value = json.loads(line)
                if isinstance(value, dict) and isinstance(value.get("message"), str):
                    found.add((str(value.get("set")), str(value.get("kind")), value["message"]))
        return found


def _identity(finding: dict[str, Any]) -> Identity:
    return finding["set"], finding["kind"], finding["message"]


class FindingsLog:
    """Logs and lists findings, and stops the run if too many rows have bad images.

    Args:
        max_bad_fraction: largest share of the rows of a set that may be dropped for their images.
    """

    def __init__(self, max_bad_fraction: float):
        self.max_bad_fraction = max_bad_fraction
        self._dropped: dict[str, set[str]] = {}  # by set: messages of rows dropped by the loaders
        self._listed: set[Identity] | None = None  # in the file; None: the file was not read yet

    def add_measured(self, name: str, dataset: OpenedDataset, writer: FindingsWriter) -> None:
        """Reports the findings of a dataset whose rows have just been measured (rank 0 writes).

        Raises:
            DataError: too many of its rows have images that cannot be opened.
        """
        images = [finding.message for finding in dataset.findings if finding.kind == "image"]
        others = [finding for finding in dataset.findings if finding.kind != "image"]
        if images and not writer.rank:
            log.warning(
                "%s: %s with values of more than 8 bits; %s in the run folder lists them. The "
                "first: %s",
                *(name, counted(len(images), "image"), FILENAME, images[0]),
            )
        if others and not writer.rank:
            dropped = sum(finding.kind == "dropped" for finding in dataset.findings)
            noted = {finding.index for finding in dataset.findings if finding.kind == "note"}
            log.warning(
                "%s: %s left out, %d repaired or kept although they look wrong; "
                "%s in the run folder lists them. The first: %s",
                name,
                counted(dropped, "row"),
                len(noted),
                FILENAME,
                others[0].message,
            )
        if not writer.rank:
            self._append(name, dataset.findings, writer)
        if dataset.bad > self.max_bad_fraction * dataset.distinct:
            raise DataError(
                f"{name}: an image of {dataset.bad} of {counted(dataset.distinct, 'row')} cannot "
                f"be opened, more than data.max_bad_fraction={self.max_bad_fraction} allows; "
                f"{FILENAME} in the run folder lists them"
            )

    def add_dropped(
        self, name: str, rows: int, dropped: Sequence[Dropped], writer: FindingsWriter
    ) -> None:
        """Reports rows that a loader has dropped, each once.

        Args:
            name: the set that the rows belong to.
            rows: number of rows of the set, on all ranks.
            dropped: for each row, why it was dropped.

        Raises:
            DataError: too many rows of the set were dropped by now.
        """
        known = self._dropped.setdefault(name, set())
        reasons = {str(error): error for error in dropped}
        new = [message for message in reasons if message not in known]
        if new and not known:
            log.warning(
                "a row of %s is left out; %s in the run folder lists it, and further ones. %s",
                name,
                FILENAME,
                new[0],
            )
        known.update(new)
        self._append(name, [reasons[message] for message in new], writer)
        if len(known) > self.max_bad_fraction * rows / writer.world_size:
            share = f", in the share of rank {writer.rank}," if writer.world_size > 1 else ""
            raise DataError(
                f"{name}: {len(known)} of {counted(rows, 'row')}{share} had to be left out, more "
                f"than data.max_bad_fraction={self.max_bad_fraction} allows; "
                f"{FILENAME} in the run folder lists them. The last: {dropped[-1]}"
            )

    def _append(
        self, name: str, findings: Sequence[Finding | Dropped], writer: FindingsWriter
    ) -> None:
        """Writes the findings that the file does not list yet."""
        if not findings:
            return
        if self._listed is None:
            self._listed = writer.listed()
        new = []
        for finding in findings:
            line = record(name, finding)
            if _identity(line) not in self._listed:
                self._listed.add(_identity(line))
                new.append(line)
        writer.append(new)
