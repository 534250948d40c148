"""Inspects a whole dataset: reads every row, decodes every image, and compares the sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwenvl_lit.data.image_notes import image_notes
from qwenvl_lit.data.loading import DROP_ADVICE
from qwenvl_lit.data.row_facts import RowFacts, RowReader, digest, with_location
from qwenvl_lit.data.selection import Concat, Rows, Subset
from qwenvl_lit.data.survey import Finding, Kind, ReportProgress, survey
from qwenvl_lit.types import Conversation, ImageSource, Turn

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor

# From mild to severe: a row counts for its most severe finding.
SEVERITY: tuple[Kind, ...] = ("duplicate", "image", "note", "dropped", "error")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image that can be decoded: the key of its content, and what is unusual about it."""

    key: str
    notes: tuple[str, ...]


# By name of an image file or address: its facts, or why it cannot be decoded.
Contents = Mapping[str, ImageFacts | Finding]


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file that the rows of a set are read from."""

    path: Path
    layout: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """The facts about one set. Boxes, tokens and answers are counted over its usable rows."""

    name: str
    rows: int
    files: tuple[File, ...]
    prompts: bool  # rows are questions to answer; their answers are references, not supervised
    lengths: np.ndarray  # (usable rows,) int32 tokens
    supervised: np.ndarray  # (usable rows,) int32 supervised tokens
    usable: np.ndarray  # (usable rows,) indices
    images: int  # distinct files and addresses, and distinct images inside rows
    boxes: int
    unanswered: int  # rows without an answer
    findings: tuple[Finding, ...]  # ordered by index
    affected: Mapping[Kind, int]  # rows by their most severe finding


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What two sets have in common, compared by content."""

    first: str
    second: str
    rows: int  # rows of the second set that repeat question and images of a row of the first
    images: int  # distinct images in both sets


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """The result of inspecting a dataset."""

    sets: tuple[SetFacts, ...]
    overlaps: tuple[Overlap, ...]  # of pairs of sets that have anything in common

    @property
    def errors(self) -> list[tuple[str, Finding]]:
        """Findings that make the dataset unusable, each with the name of its set."""
        errors = []
        for facts in self.sets:
            for finding in facts.findings:
                if finding.kind == "error":
                    errors.append((facts.name, finding))
        return errors


def inspect(
    sets: Mapping[str, Rows],
    processor: Processor,
    *,
    prompts: Collection[str] = (),
    max_bad_fraction: float = 0.0,
    workers: int = 1,
    progress: ReportProgress | None = None,
) -> Inspection:
    """Reads every row of `sets`, and decodes every image once. All errors are collected.

    Args:
        prompts: names of the sets whose rows are questions to answer.
        max_bad_fraction: if at most this share of the rows of a set have images that cannot be
            decoded, these rows count as dropped, otherwise as errors.
        workers: number of processes.
    """
    inspected: list[_InspectedSet] = []
    for name, rows in sets.items():
        inspected.append(_read_rows(name, rows, processor, name in prompts, workers, progress))
    files: dict[str, ImageSource] = {}
    for one_set in inspected:
        files.update(one_set.files)
    contents = _decode(files, workers, progress)
    for one_set in inspected:
        one_set.add_broken_images(contents, max_bad_fraction)
        one_set.add_image_notes(contents)
    overlaps = tuple(_find_overlaps(inspected, contents))
    return Inspection(sets=tuple(one_set.facts() for one_set in inspected), overlaps=overlaps)


def files_of(rows: Rows) -> Iterator[File]:
    """Yields the files that `rows` are read from, each once, in order."""
    seen: set[Path] = set()
    pending = [rows]
    while pending:
        match pending.pop(0):
            case Subset(rows=inner):
                pending.insert(0, inner)
            case Concat(sources=sources):
                pending[:0] = sources
            case source if (path := getattr(source, "file", None)) and path not in seen:
                seen.add(path)
                layout = getattr(source, "layout", None)
                # Readers of a single format have no layout.
                name = layout.name if layout else type(source).__name__
                yield File(path=path, layout=name, rows=len(source))


@dataclass(slots=True)
class _InspectedSet:
    """One set while it is inspected."""

    name: str
    rows: Rows
    prompts: bool
    files: dict[str, ImageSource] = field(default_factory=dict)  # images by path or address
    embedded: set[str] = field(default_factory=set)  # keys of images inside rows
    findings: list[Finding] = field(default_factory=list)
    broken: list[tuple[int, str, str]] = field(default_factory=list)  # index, id, message
    questions: dict[int, tuple[bytes, tuple[str, ...]]] = field(default_factory=dict)
    """By index: digest of the question, and names of its images or keys of embedded ones."""
    first_with_id: dict[bytes, int] = field(default_factory=dict)  # by digest of the id: index
    severity: np.ndarray = field(init=False)  # (rows,) 0, or 1 + index into SEVERITY
    counts: np.ndarray = field(init=False)  # (4, rows): tokens, supervised, boxes, answered

    def __post_init__(self):
        self.severity = np.zeros(len(self.rows), dtype=np.int8)
        self.counts = np.zeros((4, len(self.rows)), dtype=np.int32)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        severity = 1 + SEVERITY.index(finding.kind)
        self.severity[finding.index] = max(self.severity[finding.index], severity)

    def add_row(self, index: int, row: RowFacts) -> None:
        self.counts[:, index] = row.tokens, row.supervised_tokens, row.boxes, row.has_answer
        names = []
        for image in row.images:
            if isinstance(image, str):
                self.embedded.add(image)
                names.append(image)
            else:
                self.files.setdefault(image.name, image)
                names.append(image.name)
        self.questions[index] = row.question, tuple(names)
        for message in row.broken_images:
            self.broken.append((index, row.id, message))
        for kind, message in row.findings:
            self.add(Finding(kind=kind, index=index, id=row.id, message=message))
        first = self.first_with_id.setdefault(row.id_digest, index)
        if first != index:
            self._add_repeated_id(index, first)

    def _add_repeated_id(self, index: int, first: int) -> None:
        row, earlier = self.rows[index], self.rows[first]
        message = f"has the same id as {earlier.where or f'row {first}'}"
        message = with_location(row, f"{message}; an id tells rows apart in predictions and scores")
        self.add(Finding(kind="note", index=index, id=row.id, message=message))

    def add_broken_images(self, contents: Contents, max_bad_fraction: float) -> None:
        """Adds a finding for every image of a row that cannot be decoded."""
        errors: dict[str, str] = {}
        for name, content in contents.items():
            if isinstance(content, Finding):
                errors[name] = content.message
        if errors:
            for index, (_, names) in self.questions.items():
                for name in dict.fromkeys(names):
                    if name in errors:
                        row = self.rows[index]
                        self.broken.append((index, row.id, with_location(row, errors[name])))
        bad_rows = {index for index, _, _ in self.broken}
        few = len(bad_rows) <= max_bad_fraction * len(self.rows)
        kind: Kind = "dropped" if few else "error"
        for index, row_id, message in self.broken:
            if not few and not max_bad_fraction:
                message += f"; {DROP_ADVICE}"
            self.add(Finding(kind=kind, index=index, id=row_id, message=message))

    def add_image_notes(self, contents: Contents) -> None:
        """Adds the notes about each image, to the first row that has it."""
        known: set[str] = set()
        for index, (_, names) in self.questions.items():
            for name in names:
                content = contents.get(name)
                if name in known or not isinstance(content, ImageFacts):
                    continue
                known.add(name)
                for note in content.notes:
                    row = self.rows[index]
                    message = with_location(row, note)
                    self.add(Finding(kind="image", index=index, id=row.id, message=message))

    def facts(self) -> SetFacts:
        usable = (self.severity <= 1 + SEVERITY.index("note")).nonzero()[0]
        lengths, supervised, boxes, answered = self.counts[:, usable]
        rows_by_severity = Counter(self.severity.tolist())
        affected = {kind: rows_by_severity[1 + index] for index, kind in enumerate(SEVERITY)}
        return SetFacts(
            name=self.name,
            rows=len(self.rows),
            files=tuple(files_of(self.rows)),
            prompts=self.prompts,
            lengths=lengths,
            supervised=supervised,
            usable=usable,
            images=len(self.files) + len(self.embedded),
            boxes=int(boxes.sum()),
            unanswered=len(usable) - int(answered.sum()),
            findings=tuple(sorted(self.findings, key=lambda finding: finding.index)),
            affected=affected,
        )

    def question_keys(self, contents: Contents) -> dict[int, bytes]:
        """Returns digests of question and images by index, of the rows without broken images."""
        digests: dict[int, bytes] = {}
        for index, (question, names) in self.questions.items():
            keys: list[str] = []
            for name in names:
                match contents.get(name):
                    case ImageFacts(key=key):
                        keys.append(key)
                    case None:  # the name is the key of an embedded image
                        keys.append(name)
            if len(keys) == len(names):
                digests[index] = digest(question + repr(keys).encode())
        return digests

    def image_keys(self, contents: Contents) -> set[str]:
        """Returns the content keys of all images of the set that can be decoded."""
        decoded = (contents.get(name) for name in self.files)
        return {image.key for image in decoded if isinstance(image, ImageFacts)} | self.embedded


def _read_rows(
    name: str,
    rows: Rows,
    processor: Processor,
    prompts: bool,
    workers: int,
    progress: ReportProgress | None,
) -> _InspectedSet:
    inspected = _InspectedSet(name, rows, prompts)
    report = _report(progress, f"{name}: rows", len(rows))
    results = survey(rows, RowReader(processor, prompts), workers=workers, progress=report)
    for index, result in enumerate(results):
        if isinstance(result, Finding):
            inspected.add(result)
        else:
            inspected.add_row(index, result)
    return inspected


@dataclass(frozen=True, slots=True)
class _ImageRows(Sequence[Conversation]):
    """Images as rows with one image each, which `survey` can read."""

    names: Sequence[str]
    images: Sequence[ImageSource]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Conversation:
        turn = Turn(role="user", parts=(self.images[index],))
        return Conversation(id=self.names[index], turns=(turn,))


def _decode(
    files: Mapping[str, ImageSource], workers: int, progress: ReportProgress | None
) -> Contents:
    rows = _ImageRows(list(files), list(files.values()))
    report = _report(progress, "images", len(rows))
    results = survey(rows, _decode_image, workers=workers, progress=report)
    return dict(zip(files, results, strict=True))


def _decode_image(conversation: Conversation) -> ImageFacts:
    [image] = conversation.images
    image.open()
    return ImageFacts(image.key, tuple(image_notes(image)))


def _report(progress: ReportProgress | None, work: str, total: int) -> Callable[[int], object]:
    def report(done: int) -> None:
        if progress:
            progress(work, done, total)

    return report


def _find_overlaps(sets: Sequence[_InspectedSet], contents: Contents) -> Iterator[Overlap]:
    """Yields the overlaps of pairs of sets.

    A row that repeats a row of an earlier set becomes a finding of its own set.
    """
    questions = [one_set.question_keys(contents) for one_set in sets]
    images = [one_set.image_keys(contents) for one_set in sets]
    for (a, first), (b, second) in combinations(enumerate(sets), 2):
        first_rows: dict[bytes, int] = {}  # by question: the first row that asks it
        for index, question in questions[a].items():
            first_rows.setdefault(question, index)
        repeated = 0
        for index, question in questions[b].items():
            if question in first_rows:
                second.add(_duplicate(second, index, first, first_rows[question]))
                repeated += 1
        shared_images = len(images[a] & images[b])
        if repeated or shared_images:
            yield Overlap(first=first.name, second=second.name, rows=repeated, images=shared_images)


def _duplicate(
    one_set: _InspectedSet, index: int, earlier: _InspectedSet, earlier_index: int
) -> Finding:
    row, original = one_set.rows[index], earlier.rows[earlier_index]
    message = (
        f"asks the same question about the same images as {original.where or 'row'} "
        f"({original.id!r}) in {earlier.name}"
    )
    message = with_location(row, message)
    return Finding(kind="duplicate", index=index, id=row.id, message=message)
