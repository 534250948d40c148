"""What a whole dataset holds and what is wrong with it: every row read and counted, every image decoded, the sets compared."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from qwenvl_lit.data.selection import Concat, Rows, Subset
from qwenvl_lit.data.survey import Finding, Kind, survey
from qwenvl_lit.types import Conversation, DataError, Dropped, GroundedObject, ImageSource, Turn

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Processor


Progress = Callable[
    [str, int, int], object
]  # what is read, how much of it is done, how much there is

SEVERITY: tuple[Kind, ...] = (
    "duplicate",
    "note",
    "dropped",
    "error",
)  # a row counts for the worst that was found


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file that a set reads."""

    path: Path
    layout: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """What one set holds. Counts of boxes, tokens and answers are over the rows that can be used."""

    name: str
    rows: int
    files: tuple[File, ...]
    prompts: bool  # read as questions to answer: their answers are compared with, not learned
    lengths: np.ndarray  # (usable rows,) int32 tokens
    supervised: np.ndarray  # (usable rows,) int32 tokens that are learned
    usable: np.ndarray  # (usable rows,) indices
    images: int  # different files or addresses, and images inside rows
    boxes: int
    unanswered: int  # rows without an answer
    findings: tuple[Finding, ...]  # by index
    affected: Mapping[Kind, int]  # rows by the worst that was found


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What two sets have in common, by content."""

    first: str
    second: str
    rows: int  # rows of the second that ask the same of the same images as a row of the first
    images: int  # different images that are in both


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A dataset, gone through."""

    sets: tuple[SetFacts, ...]
    overlaps: tuple[Overlap, ...]  # of pairs of sets that have anything in common

    @property
    def errors(self) -> list[tuple[str, Finding]]:
        """Findings that keep the dataset from being used, each with the name of its set."""
        return [
            (facts.name, finding)
            for facts in self.sets
            for finding in facts.findings
            if finding.kind == "error"
        ]


def inspect(
    sets: Mapping[str, Rows],
    processor: Processor,
    *,
    prompts: Collection[str] = (),
    max_bad_fraction: float = 0.0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Inspection:
    """Read every row of `sets` and decode every image once; faults are collected, whatever their number.

    Args:
        prompts: names of sets whose rows are questions to answer.
        max_bad_fraction: share of a set's rows that are dropped if their images cannot be decoded; more are errors.
        workers: processes.
    """
    gathered = [
        _gather(name, rows, processor, name in prompts, workers, progress)
        for name, rows in sets.items()
    ]
    files: dict[str, ImageSource] = {}
    for some in gathered:
        files.update(some.files)
    contents = _decode(files, workers, progress)
    for some in gathered:
        some.add_broken_images(contents, max_bad_fraction)
    overlaps = list(_overlaps(gathered, contents))
    return Inspection(sets=tuple(some.facts() for some in gathered), overlaps=tuple(overlaps))


def files_of(rows: Rows) -> Iterator[File]:
    """The files that rows come from, each once, in order."""
    seen: set[Path] = set()
    todo = [rows]
    while todo:
        match todo.pop(0):
            case Subset(rows=inner):
                todo.insert(0, inner)
            case Concat(sources=sources):
                todo[:0] = sources
            case source if (path := getattr(source, "file", None)) and path not in seen:
                seen.add(path)
                layout = getattr(source, "layout", None)  # readers of a single format have none
                yield File(
                    path=path,
                    layout=layout.name if layout else type(source).__name__,
                    rows=len(source),
                )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is kept of a row: little, since all rows of a dataset are in memory at once."""

    tokens: int
    supervised: int
    boxes: int
    answered: bool
    question: bytes  # digest of all that is asked, images left open
    images: tuple[
        ImageSource | str, ...
    ]  # files and addresses; the content's key of an image inside the row
    broken: tuple[str, ...]  # what is wrong with images inside the row
    said: tuple[tuple[Kind, str], ...]
    id: str  # of a row of which anything is said or broken, else empty


@dataclass(frozen=True, slots=True)
class _Look:
    processor: Processor
    prompt: bool

    def __call__(self, conversation: Conversation) -> _Seen:
        said: list[tuple[Kind, str]] = [
            ("note", _at(conversation, note)) for note in conversation.notes
        ]
        tokens = supervised = 0
        try:
            tokens, supervised = self.processor.length(conversation, prompt=self.prompt)
        except DataError as fault:
            said.append(("dropped" if isinstance(fault, Dropped) else "error", str(fault)))
        images: list[ImageSource | str] = []
        broken: list[str] = []
        for image in conversation.images:
            if not isinstance(image.source, bytes | Image.Image):
                images.append(image)
                continue
            try:
                image.open()
                images.append(image.key)
            except DataError as fault:
                broken.append(_at(conversation, fault))
        return _Seen(
            tokens=tokens,
            supervised=supervised,
            boxes=sum(
                len(part.boxes)
                for turn in conversation.turns
                for part in turn.parts
                if isinstance(part, GroundedObject)
            ),
            answered=conversation.answer is not None,
            question=_digest(conversation),
            images=tuple(images),
            broken=tuple(broken),
            said=tuple(said),
            id=conversation.id if broken or said else "",
        )


def _at(conversation: Conversation, message: object) -> str:
    """The message with file, line and id in front, unless it has them."""
    text = str(message)
    where = f"{conversation.where}: row {conversation.id!r}: ".removeprefix(": ")
    return text if conversation.where and text.startswith(conversation.where) else where + text


def _digest(conversation: Conversation) -> bytes:
    asked = [
        (turn.role, ["" if isinstance(part, ImageSource) else part for part in turn.parts])
        for turn in conversation.prompt().turns
    ]
    return hashlib.blake2b(repr(asked).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _content(conversation: Conversation) -> str:
    [image] = conversation.images
    image.open()
    return image.key


@dataclass(frozen=True, slots=True)
class _ImageRows(Sequence[Conversation]):
    """Images as rows of one each, for `survey`."""

    names: Sequence[str]
    images: Sequence[ImageSource]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> Conversation:
        return Conversation(
            id=self.names[place], turns=(Turn(role="user", parts=(self.images[place],)),)
        )


def _decode(
    files: Mapping[str, ImageSource], workers: int, progress: Progress | None
) -> dict[str, str | Finding]:
    """The content's key of each image, or why it cannot be decoded."""
    rows = _ImageRows(list(files), list(files.values()))
    return dict(
        zip(
            files,
            survey(
                rows, _content, workers=workers, progress=_telling(progress, "images", len(rows))
            ),
            strict=True,
        )
    )


def _telling(progress: Progress | None, what: str, total: int) -> Callable[[int], object] | None:
    return (lambda done: progress(what, done, total)) if progress else None


def _gather(
    name: str,
    rows: Rows,
    processor: Processor,
    prompts: bool,
    workers: int,
    progress: Progress | None,
) -> _Gathered:
    some = _Gathered(name, rows, prompts)
    look = _Look(processor, prompts)
    for index, seen in enumerate(
        survey(rows, look, workers=workers, progress=_telling(progress, f"{name}: rows", len(rows)))
    ):
        if isinstance(seen, Finding):
            some.add(seen)
        else:
            some.take(index, seen)
    return some


@dataclass(slots=True)
class _Gathered:
    """One set while it is gone through."""

    name: str
    rows: Rows
    prompts: bool
    files: dict[str, ImageSource] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    worst: np.ndarray = field(init=False)  # (rows,) 0, or 1 + place in SEVERITY
    counts: np.ndarray = field(init=False)  # (4, rows): tokens, supervised tokens, boxes, answered
    questions: dict[int, tuple[bytes, tuple[str, ...]]] = field(
        default_factory=dict
    )  # by index: digest and names or keys of images
    broken: list[tuple[int, str, str]] = field(default_factory=list)  # index, id, message
    inside: set[str] = field(default_factory=set)  # keys of images inside rows

    def __post_init__(self):
        self.worst = np.zeros(len(self.rows), dtype=np.int8)
        self.counts = np.zeros((4, len(self.rows)), dtype=np.int32)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.worst[finding.index] = max(self.worst[finding.index], 1 + SEVERITY.index(finding.kind))

    def take(self, index: int, seen: _Seen) -> None:
        self.counts[:, index] = seen.tokens, seen.supervised, seen.boxes, seen.answered
        names = []
        for image in seen.images:
            if isinstance(image, str):
                self.inside.add(image)
                names.append(image)
            else:
                self.files.setdefault(image.name, image)
                names.append(image.name)
        self.questions[index] = seen.question, tuple(names)
        self.broken += [(index, seen.id, message) for message in seen.broken]
        for kind, message in seen.said:
            self.add(Finding(kind=kind, index=index, id=seen.id, message=message))

    def add_broken_images(
        self, contents: Mapping[str, str | Finding], max_bad_fraction: float
    ) -> None:
        faults = {
            name: content.message
            for name, content in contents.items()
            if isinstance(content, Finding)
        }
        for index, (_, names) in self.questions.items() if faults else ():
            for name in filter(faults.__contains__, dict.fromkeys(names)):
                row = self.rows[index]
                self.broken.append((index, row.id, _at(row, faults[name])))
        few = len({index for index, *_ in self.broken}) <= max_bad_fraction * len(self.rows)
        for index, id, message in self.broken:
            self.add(
                Finding(kind="dropped" if few else "error", index=index, id=id, message=message)
            )

    def facts(self) -> SetFacts:
        usable = (self.worst <= SEVERITY.index("note") + 1).nonzero()[0]
        tokens, supervised, boxes, answered = self.counts[:, usable]
        amounts = Counter(self.worst.tolist())
        return SetFacts(
            name=self.name,
            rows=len(self.rows),
            files=tuple(files_of(self.rows)),
            prompts=self.prompts,
            lengths=tokens,
            supervised=supervised,
            usable=usable,
            images=len(self.files) + len(self.inside),
            boxes=int(boxes.sum()),
            unanswered=len(usable) - int(answered.sum()),
            findings=tuple(sorted(self.findings, key=lambda finding: finding.index)),
            affected={kind: amounts[1 + place] for place, kind in enumerate(SEVERITY)},
        )


def _overlaps(
    gathered: Sequence[_Gathered], contents: Mapping[str, str | Finding]
) -> Iterator[Overlap]:
    """Pairs of sets that have something in common; the rows of the later one that repeat the earlier one become findings of it."""
    asked = [_asked(some, contents) for some in gathered]
    shown = [
        {content for content in map(contents.get, some.files) if isinstance(content, str)}
        | some.inside
        for some in gathered
    ]
    for (a, first), (b, second) in combinations(enumerate(gathered), 2):
        places = {
            key: index for index, key in reversed(asked[a].items())
        }  # the first row that asks it
        common = [(index, places[key]) for index, key in asked[b].items() if key in places]
        for index, place in common:
            row, other = second.rows[index], first.rows[place]
            message = f"asks the same of the same images as {other.where or 'row'} ({other.id!r}) in {first.name}"
            second.add(Finding(kind="duplicate", index=index, id=row.id, message=_at(row, message)))
        if common or shown[a] & shown[b]:
            yield Overlap(
                first=first.name,
                second=second.name,
                rows=len(common),
                images=len(shown[a] & shown[b]),
            )


def _asked(some: _Gathered, contents: Mapping[str, str | Finding]) -> dict[int, bytes]:
    """What each row asks of which images, by content; rows with broken images are left out."""
    digests = {}
    for index, (question, names) in some.questions.items():
        keys = [
            contents.get(name, name) for name in names
        ]  # what has no content is the key of an image inside the row
        if not any(isinstance(key, Finding) for key in keys):
            digests[index] = hashlib.blake2b(
                question + repr(keys).encode(), digest_size=16
            ).digest()
    return digests
