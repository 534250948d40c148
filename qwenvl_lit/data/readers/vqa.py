"""Visual question answering: the published VQA files and the jsonl files of Qwen-VL's evaluation.

A VQA dataset is a file of questions and a file of annotations, which hold the answers.
"""

from __future__ import annotations

import reprlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_lit.data.download.archives import Archive, ensure_unpacked
from qwenvl_lit.data.readers.coco import check_texts, fetch_coco, only, read_json
from qwenvl_lit.data.readers.prompts import VQA_PROMPT, fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, image_from
from qwenvl_lit.data.readers.sources import FileRows, open_source
from qwenvl_lit.types import Conversation, DataError, Turn

_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
ARCHIVES = (
    Archive(
        url=f"{_VQA}v2_Questions_Train_mscoco.zip",
        size=7_239_401,
        members=("v2_OpenEnded_mscoco_train2014_questions.json",),
    ),
    Archive(
        url=f"{_VQA}v2_Questions_Val_mscoco.zip",
        size=3_494_929,
        members=("v2_OpenEnded_mscoco_val2014_questions.json",),
    ),
    Archive(
        url=f"{_VQA}v2_Annotations_Train_mscoco.zip",
        size=21_708_861,
        members=("v2_mscoco_train2014_annotations.json",),
    ),
    Archive(
        url=f"{_VQA}v2_Annotations_Val_mscoco.zip",
        size=10_518_930,
        members=("v2_mscoco_val2014_annotations.json",),
    ),
)


def fetch_vqav2(
    root: str | Path, download: bool = True, *, splits: Sequence[str] = ("train2014", "val2014")
) -> None:
    """Fetches what is missing of VQAv2's `splits`: its files to `vqav2`, COCO's images to `coco`.

    Raises:
        DataError: as `ensure_unpacked`.
    """
    archives = []
    for archive in ARCHIVES:
        (member,) = archive.members
        if any(split in member for split in splits):
            archives.append(archive)
    ensure_unpacked(archives, Path(root) / "vqav2", download=download)
    fetch_coco(root, download, files=splits, folder="coco")


def read_vqa(
    source: str, read_options: ReadOptions = DEFAULT, *, image: str
) -> Sequence[Conversation]:
    """Returns questions in VQA's format, with the answers from the annotations file beside them.

    The most frequent answer is supervised, and all answers are references.

    Args:
        source: a file of questions, as in `read_rows`. The answers to
            `v2_OpenEnded_mscoco_val2014_questions.json` are in
            `v2_mscoco_val2014_annotations.json`; only test splits may have none.
        image: file of an image within `read_options.root`, with `{image_id}` and `{split}`, for
            example `val2014`.
    """
    return open_source(
        source, read_options, lambda file: VQAQuestions(file, read_options, image=image)
    )


def read_answered(
    source: str, read_options: ReadOptions = DEFAULT, *, answers: str
) -> Sequence[Conversation]:
    """Returns rows as `read_rows` does, with references by `question_id` from a file beside them.

    Args:
        answers: an annotations file in VQA's format, in the folder of the rows' file; `{stem}`
            stands for the name of the rows' file without its suffix.
    """

    def read(file: Path) -> AnsweredRows:
        annotations = file.with_name(answers.format(stem=file.stem))
        return AnsweredRows(file, annotations, read_options)

    return open_source(source, read_options, read)


class VQAQuestions(Sequence[Conversation]):
    """The questions of one file. The `question_id` is the row's id.

    Raises:
        DataError: a file is not in VQA's format, there are no answers, or the image of a row does
            not exist.
    """

    def __init__(self, file: Path, read_options: ReadOptions = DEFAULT, *, image: str):
        self.file = file
        self.read_options = read_options
        self.image = image
        self._prompt = read_options.prompt or VQA_PROMPT
        fill_prompt(self._prompt, image="", question="")  # check it now
        content = read_json(
            file, only("questions", "data_subtype", "image_id", "question", "question_id")
        )
        try:
            self._split = str(content.get("data_subtype", "")).replace("-dev", "")
            self._rows = _rows_of(content["questions"])
        except (KeyError, TypeError, AttributeError, UnicodeError) as error:
            raise DataError(
                f"{file} is not in VQA's format: {error!r:.200}; "
                f"expected {{questions: [{{question_id, image_id, question}}]}}"
            ) from None
        if not self._rows:
            raise DataError(f"{file} has no questions")
        self.files = (file,)
        self._answers: dict[Any, tuple[str, tuple[str, ...]]] = {}
        if not self._split.startswith("test"):
            name = file.name.replace("OpenEnded_", "").replace("questions", "annotations")
            annotations = file.with_name(name)
            self.files = (file, annotations)
            self._answers = read_answers(annotations)
            self._check_answered(annotations)

    def _check_answered(self, annotations: Path) -> None:
        missing = [row_id for row_id, _, _ in self._rows if row_id not in self._answers]
        if missing:
            raise DataError(
                f"{annotations} lacks {len(missing)} of the questions of {self.file.name}, the "
                f"first is {missing[0]}; do the files belong together?"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        row_id, image_id, question = self._rows[index]
        try:
            name = self._image_name(image_id)
            image = image_from(name, self.read_options.root or self.file.parent, self.read_options)
            parts = fill_prompt(self._prompt, image=image, question=question)
        except DataError as error:
            raise error.in_row(str(self.file), str(row_id)) from None
        turns = [Turn(role="user", parts=parts)]
        answer, references = self._answers.get(row_id, (None, ()))
        if answer is not None:
            turns.append(Turn(role="assistant", parts=(answer,)))
        return Conversation(
            id=str(row_id),
            turns=tuple(turns),
            references=references,
            index=index,
            where=str(self.file),
        )

    def _image_name(self, image_id: Any) -> str:
        try:
            return self.image.format(image_id=image_id, split=self._split)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"`image` {self.image!r} does not fit the image_id {reprlib.repr(image_id)}: "
                f"{error!r}"
            ) from None


def _rows_of(questions: Sequence[dict[str, Any]]) -> list[tuple[int | str, Any, str]]:
    """Returns (question id, image id, question) of each question."""
    rows = [(each["question_id"], each["image_id"], each["question"]) for each in questions]
    check_texts(question for _, _, question in rows)
    if not all(isinstance(question_id, int | str) for question_id, _, _ in rows):
        raise TypeError("a question_id is neither a number nor text")
    return rows


class AnsweredRows(Sequence[Conversation]):
    """The rows of `file`, with references from the annotations file `answers`.

    Raises:
        DataError: as `FileRows` and `read_answers`, or `answers` lacks a row.
    """

    def __init__(self, file: Path, answers: Path, read_options: ReadOptions = DEFAULT):
        self.file = file
        self.answers = answers
        self.files = (file, answers)
        self._rows = FileRows(file, read_options)
        self._references = {
            str(row_id): references for row_id, (_, references) in read_answers(answers).items()
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        row = self._rows[index]
        if row.id not in self._references:
            raise DataError(
                f"the question is not in {self.answers}; do the files belong together?"
            ).in_row(row.where, row.id)
        return replace(row, references=self._references[row.id])


def read_answers(file: Path) -> dict[Any, tuple[str, tuple[str, ...]]]:
    """Returns the most frequent answer and all answers, by question id, of an annotations file.

    Raises:
        DataError: the file cannot be read or is not in VQA's format.
    """
    keep = only("annotations", "question_id", "answers", "multiple_choice_answer")

    def text_or_mapping(entry: dict[str, Any]) -> Any:
        # Interned: half a million questions share few answers.
        return sys.intern(entry["answer"]) if "answer" in entry else keep(entry)

    answers = {}
    try:
        for entry in read_json(file, text_or_mapping)["annotations"]:
            texts = tuple(entry["answers"])
            check_texts(texts)
            answer = entry.get("multiple_choice_answer")
            if not answer:
                answer, _ = Counter(texts).most_common(1)[0]
            answers[entry["question_id"]] = (sys.intern(answer), texts)
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeError) as error:
        raise DataError(
            f"{file} is not in VQA's format: {error!r:.200}; "
            f"expected {{annotations: [{{question_id, answers: [{{answer}}]}}]}}"
        ) from None
    return answers
