"""Inspects a whole dataset: reads every row, decodes every image, and compares the sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwenvl_lit.data.image_notes import image_notes
from qwenvl_lit.data.row_facts import RowFacts, RowReader, digest
from qwenvl_lit.data.selection import Rows, flatten
from qwenvl_lit.data.survey import DROP_ADVICE, Finding, Kind, ReportProgress, survey
from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn

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
    rows: int  # in the file
    used: int  # distinct ones, by the set


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """The facts about one set. Boxes and tokens are counted over its usable rows."""

    name: str
    rows: int
    files: tuple[File, ...]
    prompts: bool  # rows are questions to answer; their answers are references, not supervised
    lengths: np.ndarray  # (usable rows,) int32 tokens
    supervised: np.ndarray  # (usable rows,) int32 supervised tokens
    usable: np.ndarray  # (usable rows,) indices
    images: int  # distinct files and addresses, and distinct images inside rows
    boxes: int
    unanswered: int  # rows without an answer, of all that can be read
    empty_answers: int  # rows whose answer is empty or blank, of all that can be read
    bad_images: int  # rows with an image that is missing or cannot be decoded
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
    max_bad_fraction: float | None = None  # as in `inspect`

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
    max_bad_fraction: float | None = None,
    workers: int = 1,
    progress: ReportProgress | None = None,
) -> Inspection:
    """Reads every row of `sets`, and decodes every image once. All errors are collected.

    Args:
        prompts: names of the sets whose rows are questions to answer.
        max_bad_fraction: if at most this share of the rows of a set have images that are missing or
            cannot be decoded, these rows count as dropped, otherwise as errors. None: they are
            errors.
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
    facts = tuple(one_set.facts() for one_set in inspected)
    return Inspection(sets=facts, overlaps=overlaps, max_bad_fraction=max_bad_fraction)


def files_of(rows: Rows) -> Iterator[File]:
    """Yields the files that `rows` are read from, in order."""
    sources, indices = flatten(rows)
    distinct = np.unique(indices)
    start = 0
    for source in sources:
        end = start + len(source)
        used = np.count_nonzero((start <= distinct) & (distinct < end))
        start = end
        if used and (path := getattr(source, "file", None)):
            layout = getattr(source, "layout", None)
            # Readers of a single format have no layout.
            name = layout.name if layout else type(source).__name__
            yield File(path=path, layout=name, rows=len(source), used=int(used))


@dataclass(slots=True)
class _InspectedSet:
    """One set while it is inspected."""

    name: str
    rows: Rows
    prompts: bool
    files: dict[str, ImageSource] = field(default_factory=dict)  # images by path or address
    embedded: set[str] = field(default_factory=set)  # keys of images inside rows
    findings: list[Finding] = field(default_factory=list)
    broken: list[Finding] = field(default_factory=list)  # about images; their kind is not decided
    questions: dict[int, tuple[bytes, tuple[str, ...]]] = field(default_factory=dict)
    """By index: digest of the question, and names of its images or keys of embedded ones."""
    first_with_id: dict[bytes, int] = field(default_factory=dict)  # by digest of the id: index
    severity: np.ndarray = field(init=False)  # (rows,) 0, or 1 + index into SEVERITY
    counts: np.ndarray = field(init=False)
    """(5, rows): tokens, supervised tokens, boxes, has no answer, has an empty answer."""

    def __post_init__(self):
        self.severity = np.zeros(len(self.rows), dtype=np.int8)
        self.counts = np.zeros((5, len(self.rows)), dtype=np.int32)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        severity = 1 + SEVERITY.index(finding.kind)
        self.severity[finding.index] = max(self.severity[finding.index], severity)

    def add_row(self, index: int, row: RowFacts) -> None:
        self.counts[:3, index] = row.tokens, row.supervised_tokens, row.boxes
        self.counts[3:, index] = not row.has_answer, row.has_empty_answer
        names = []
        for image in row.images:
            if isinstance(image, str):
                self.embedded.add(image)
                names.append(image)
            else:
                self.files.setdefault(image.name, image)
                names.append(image.name)
        self.questions[index] = row.question, tuple(names)
        for problem in row.broken_images:
            self.broken.append(_finding("error", index, row.where, row.id, problem))
        for kind, problem in row.findings:
            self.add(_finding(kind, index, row.where, row.id, problem))
        first = self.first_with_id.setdefault(row.id_digest, index)
        if first != index:
            self._add_repeated_id(index, first)

    def note_unanswered(self) -> None:
        """Notes the prompts without an answer, unless no row of the set has one."""
        unanswered = self.counts[3].nonzero()[0]
        if not self.prompts or len(unanswered) == len(self.questions):
            return
        for index in map(int, unanswered):
            row = self.rows[index]
            problem = "the row has no answer, and metrics that compare with one leave it out"
            self.add(_finding("note", index, row.where, row.id, problem))

    def _add_repeated_id(self, index: int, first: int) -> None:
        row, earlier = self.rows[index], self.rows[first]
        problem = f"has the same id as {earlier.where or f'row {first}'}"
        problem += "; an id tells rows apart in predictions and scores"
        self.add(_finding("note", index, row.where, row.id, problem))

    def add_broken_images(self, contents: Contents, max_bad_fraction: float | None) -> None:
        """Adds a finding for every image of a row that is missing or cannot be decoded."""
        errors: dict[str, str] = {}
        for name, content in contents.items():
            if isinstance(content, Finding):
                errors[name] = content.problem
        if errors:
            for index, (_, names) in self.questions.items():
                for name in dict.fromkeys(names):
                    if name in errors:
                        row = self.rows[index]
                        self.broken.append(
                            _finding("error", index, row.where, row.id, errors[name])
                        )
        kind: Kind = "error"
        advice = ""
        if max_bad_fraction is None:
            advice = f"; {DROP_ADVICE}"
        elif self.bad_images <= max_bad_fraction * len(self.rows):
            kind = "dropped"
        for finding in self.broken:
            message = finding.message + advice
            self.add(replace(finding, kind=kind, message=message, bad_image=True))

    @property
    def bad_images(self) -> int:
        """The number of rows with an image that is missing or cannot be decoded."""
        return len({finding.index for finding in self.broken})

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
                    self.add(_finding("image", index, row.where, row.id, note))

    def facts(self) -> SetFacts:
        usable = (self.severity <= 1 + SEVERITY.index("note")).nonzero()[0]
        lengths, supervised, boxes = self.counts[:3, usable]
        unanswered, empty_answers = self.counts[3:].sum(axis=1).tolist()
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
            unanswered=unanswered,
            empty_answers=empty_answers,
            bad_images=self.bad_images,
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
        if isinstance(result, Finding) and result.bad_image:
            inspected.broken.append(result)
        elif isinstance(result, Finding):
            inspected.add(result)
        else:
            inspected.add_row(index, result)
    inspected.note_unanswered()
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
    problem = (
        f"asks the same question about the same images as {original.where or 'row'} "
        f"({original.id!r}) in {earlier.name}"
    )
    return _finding("duplicate", index, row.where, row.id, problem)


def _finding(kind: Kind, index: int, where: str, row_id: str, problem: str) -> Finding:
    error = DataError(problem).in_row(where, row_id)
    return Finding(kind=kind, index=index, id=row_id, message=str(error), where=where)
