"""Visual question answering: VQA's files of questions and answers, and the jsonl files of Qwen-VL's evaluation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_lit.data.download.archives import Archive, provide
from qwenvl_lit.data.readers.coco import check_texts, fetch_coco, only, read_json
from qwenvl_lit.data.readers.prompts import VQA_PROMPT, ask
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, image_from
from qwenvl_lit.data.readers.sources import FileRows, open_source
from qwenvl_lit.types import Conversation, DataError, Turn

_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
ARCHIVES = (
    Archive(
        url=f"{_VQA}v2_Questions_Train_mscoco.zip",
        size=7_239_401,
        gives=("v2_OpenEnded_mscoco_train2014_questions.json",),
    ),
    Archive(
        url=f"{_VQA}v2_Questions_Val_mscoco.zip",
        size=3_494_929,
        gives=("v2_OpenEnded_mscoco_val2014_questions.json",),
    ),
    Archive(
        url=f"{_VQA}v2_Annotations_Train_mscoco.zip",
        size=21_708_861,
        gives=("v2_mscoco_train2014_annotations.json",),
    ),
    Archive(
        url=f"{_VQA}v2_Annotations_Val_mscoco.zip",
        size=10_518_930,
        gives=("v2_mscoco_val2014_annotations.json",),
    ),
)


def fetch_vqav2(
    root: str | Path, download: bool = True, *, splits: Sequence[str] = ("train2014", "val2014")
) -> None:
    """See that `root` holds VQAv2's files of `splits` in `vqav2` and COCO's images in `coco`.

    Raises:
        DataError: as `provide`.
    """
    wanted = [archive for archive in ARCHIVES if any(split in archive.gives[0] for split in splits)]
    provide(wanted, Path(root) / "vqav2", download=download)
    fetch_coco(root, download, files=splits, folder="coco")


def read_vqa(
    source: str, read_options: ReadOptions = DEFAULT, *, image: str
) -> Sequence[Conversation]:
    """Questions in VQA's format, the answers of the annotations file beside them: the most frequent is learned, all are references.

    Args:
        source: a file of questions, as in `read_rows`. `v2_OpenEnded_mscoco_val2014_questions.json` is answered by
            `v2_mscoco_val2014_annotations.json`; only questions of a test split may be without.
        image: file of an image within `read_options.root`, with `{image_id}` and `{split}`, the latter as `val2014`.
    """
    return open_source(
        source, read_options, lambda file: VQAQuestions(file, read_options, image=image)
    )


def read_answered(
    source: str, read_options: ReadOptions = DEFAULT, *, answers: str
) -> Sequence[Conversation]:
    """Rows as `read_rows` gives them, their references from a file in VQA's format, by `question_id`.

    Args:
        answers: that file, with `{stem}` for the name of the rows' file without its ending, in the same folder.
    """

    return open_source(
        source,
        read_options,
        lambda file: AnsweredRows(
            file, file.with_name(answers.format(stem=file.stem)), read_options
        ),
    )


class VQAQuestions(Sequence[Conversation]):
    """The questions of one file; the `question_id` is the row's id.

    Raises:
        DataError: a file is not in VQA's format, there are no answers, or a row's image does not exist.
    """

    def __init__(self, file: Path, read_options: ReadOptions = DEFAULT, *, image: str):
        self.file = file
        self.read_options = read_options
        self.image = image
        self._prompt = read_options.prompt or VQA_PROMPT
        ask(self._prompt, image="", question="")
        content = read_json(
            file, only("questions", "data_subtype", "image_id", "question", "question_id")
        )
        try:
            self._split = str(content.get("data_subtype", "")).replace("-dev", "")
            self._rows = [
                (row["question_id"], row["image_id"], row["question"])
                for row in content["questions"]
            ]
            check_texts(question for _, _, question in self._rows)
            if not all(isinstance(id, int | str) for id, _, _ in self._rows):
                raise TypeError("a question_id is neither a number nor text")
        except (KeyError, TypeError, AttributeError, UnicodeError) as fault:
            raise DataError(
                f"{file} is not in VQA's format: {fault!r}; expected {{questions: [{{question_id, image_id, question}}]}}"
            ) from None
        if not self._rows:
            raise DataError(f"{file} has no questions")
        answered = file.with_name(
            file.name.replace("OpenEnded_", "").replace("questions", "annotations")
        )
        public = not self._split.startswith("test")
        self.files = (file, answered) if public else (file,)
        self._answers = read_answers(answered) if public else {}
        missing = [id for id, _, _ in self._rows if id not in self._answers] if public else []
        if missing:
            raise DataError(
                f"{answered} lacks {len(missing)} of the questions of {file.name}, the first is {missing[0]}; do they belong together?"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Conversation:
        place = range(len(self))[place]
        id, image, question = self._rows[place]
        try:
            name = self.image.format(image_id=image, split=self._split)
            parts = {
                "image": image_from(
                    name, self.read_options.root or self.file.parent, self.read_options
                ),
                "question": question,
            }
            turns = [Turn(role="user", parts=ask(self._prompt, **parts))]
        except (KeyError, ValueError) as fault:  # also of an image template that does not fit
            raise DataError(f"{self.file}: question {id}: {fault}") from None
        learned, references = self._answers.get(id, (None, ()))
        if learned is not None:
            turns.append(Turn(role="assistant", parts=(learned,)))
        return Conversation(
            id=str(id), turns=tuple(turns), references=references, index=place, where=str(self.file)
        )


class AnsweredRows(Sequence[Conversation]):
    """The rows of `file` with references from `answers`.

    Raises:
        DataError: as `FileRows` and `read_answers`, or a row has no answers there.
    """

    def __init__(self, file: Path, answers: Path, read_options: ReadOptions = DEFAULT):
        self.file = file
        self.answers = answers
        self.files = (file, answers)
        self._rows = FileRows(file, read_options)
        self._references = {
            str(id): references for id, (_, references) in read_answers(answers).items()
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Conversation:
        row = self._rows[place]
        if row.id not in self._references:
            raise DataError(
                f"{row.where}: question {row.id} is not in {self.answers}; do the files belong together?"
            )
        return replace(row, references=self._references[row.id])


def read_answers(file: Path) -> dict[Any, tuple[str, tuple[str, ...]]]:
    """From question id to the most frequent answer and all answers, of a file of annotations in VQA's format.

    Raises:
        DataError: it cannot be read or is not in that format.
    """
    row = only("annotations", "question_id", "answers", "multiple_choice_answer")
    try:
        # an answer becomes its text at once, and equal texts one object: half a million questions share few answers
        content = read_json(
            file, lambda found: sys.intern(found["answer"]) if "answer" in found else row(found)
        )
        found = {}
        for each in content["annotations"]:
            texts = tuple(each["answers"])
            check_texts(texts)
            learned = each.get("multiple_choice_answer") or Counter(texts).most_common(1)[0][0]
            found[each["question_id"]] = (sys.intern(learned), texts)
        return found
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeError) as fault:
        raise DataError(
            f"{file} is not in VQA's format: {fault!r}; expected {{annotations: [{{question_id, answers: [{{answer}}]}}]}}"
        ) from None
