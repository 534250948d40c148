"""MME: two questions about each image, one for yes and one for no."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_lit.data.readers.drafts import ImageReference
from qwenvl_lit.data.readers.keys import image_of, short
from qwenvl_lit.data.readers.parquet import ParquetRows
from qwenvl_lit.data.readers.prompts import fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, referenced_image
from qwenvl_lit.data.readers.sources import files_of, open_source
from qwenvl_lit.data.selection import parse_count, take
from qwenvl_lit.types import Conversation, DataError, Turn

PROMPT = "{image}{question}"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
QUESTIONS_OF_IMAGE = 2
# Subtasks whose images and texts are in two folders; those of the others are side by side.
IMAGES, TEXTS = "images", "questions_answers_YN"
TEXT_COLUMNS = ("question_id", "question", "answer", "category")  # of lmms-lab/MME


class Question(NamedTuple):
    image: ImageReference
    image_name: str
    number: int  # of the question, counted from 1
    text: str
    answer: str
    where: str  # file:line


def read_mme(
    source: str, read_options: ReadOptions = DEFAULT, *, parquet: str | None = None
) -> Sequence[Conversation]:
    """Returns the questions of a subtask of MME in the published layout.

    Args:
        source: the folder of a subtask, such as `MME_Benchmark_release_version/existence`, as in
            `read_rows`. It has the images and, for each of them, a text file of the same name with
            two lines `question<TAB>answer`; or both in the folders `images` and
            `questions_answers_YN`.
        parquet: files, a glob or an address of the hub with the questions of all subtasks, in the
            columns of lmms-lab/MME: `question_id` (SUBTASK/IMAGE, the same for both questions about
            an image), `image`, `question`, `answer` and `category` (the subtask). Of `source`, only
            the name of the subtask then counts.

    Raises:
        DataError: see `Subtask`; or the files have no such columns or no rows of the subtask.
    """
    if parquet is None:
        return open_source(
            source,
            read_options,
            lambda folder: Subtask(folder.name, _questions_in_folder(folder), read_options),
        )
    path, count = parse_count(source)
    name = Path(path).name
    files = tuple(files_of(os.path.expanduser(parquet), read_options))
    by_subtask = _questions_in_parquet(files, read_options.cache)
    if name not in by_subtask:
        raise DataError(
            f"{parquet} has no rows of the category {name!r}; it has {', '.join(by_subtask)}"
        )
    rows = Subtask(name, by_subtask[name], read_options)
    if count is None:
        return rows
    return take(rows, count, read_options.seed)


class Subtask(Sequence[Conversation]):
    """The questions of one subtask, sorted by image.

    The id of a row is SUBTASK/IMAGE/NUMBER. The column `image_name` has the name of the image.
    """

    def __init__(
        self, name: str, questions: Sequence[Question], read_options: ReadOptions = DEFAULT
    ):
        self.name = name
        self.read_options = read_options
        self._prompt = read_options.prompt or PROMPT
        fill_prompt(self._prompt, image="", question="")  # check it now
        self._questions = questions

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        question = self._questions[index]
        try:
            image = referenced_image(question.image, Path(), self.read_options)
            parts = fill_prompt(self._prompt, image=image, question=question.text)
        except DataError as error:
            raise error.in_row(question.where) from None
        return Conversation(
            id=f"{self.name}/{question.image_name}/{question.number}",
            turns=(
                Turn(role="user", parts=parts),
                Turn(role="assistant", parts=(question.answer,)),
            ),
            columns={"image_name": question.image_name},
            index=index,
            where=question.where,
        )


@lru_cache(maxsize=1)  # the subtasks of a benchmark are opened one after the other
def _questions_in_parquet(files: tuple[Path, ...], cache: Path | None) -> dict[str, list[Question]]:
    """Returns the questions of each subtask, sorted by image as those of a folder.

    Raises:
        DataError: a row is not in the format of lmms-lab/MME, or an image has not two questions.
    """
    by_image: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for file in files:
        rows = ParquetRows(file, cache)
        for index, row in enumerate(rows):
            subtask, question = _question_in_row(row, rows.where(index))
            questions = by_image[subtask, question.image_name]
            questions.append(question._replace(number=len(questions) + 1))
    by_subtask: dict[str, list[Question]] = defaultdict(list)
    for subtask, name in sorted(by_image, key=lambda key: (key[0], Path(key[1]).stem + ".txt")):
        questions = by_image[subtask, name]
        if len(questions) != QUESTIONS_OF_IMAGE:
            raise DataError(
                f"{questions[0].where}: the image {subtask}/{name} has {len(questions)} questions; "
                f"MME has {QUESTIONS_OF_IMAGE} for each image"
            )
        by_subtask[subtask] += questions
    return dict(by_subtask)


def _question_in_row(row: Mapping[str, Any], where: str) -> tuple[str, Question]:
    """Returns the subtask and the question of a row of lmms-lab/MME."""
    name, text, answer, subtask = texts = [row.get(key) for key in TEXT_COLUMNS]
    are_texts = all(isinstance(value, str) and value.strip() for value in texts)
    is_complete = are_texts and row.get("image") is not None
    if not is_complete or answer.strip().lower() not in ("yes", "no"):
        raise DataError(
            f"expected the columns of lmms-lab/MME: image and the texts {', '.join(TEXT_COLUMNS)}, "
            f"with the answer Yes or No; got {short(dict(row))}"
        ).in_row(where)
    name = name.rpartition("/")[2]
    return subtask, Question(image_of(row["image"]), name, 0, text.strip(), answer.strip(), where)


def _questions_in_folder(folder: Path) -> list[Question]:
    """Returns the questions of a subtask in the published layout.

    Raises:
        DataError: the folder has no text files, one of them is not in MME's format, or an image is
            missing.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is a file; give the folder of a subtask of MME, such as "
            f"MME_Benchmark_release_version/existence, or set data.read.parquet to a parquet file"
        )
    texts, images = folder, folder
    if (folder / TEXTS).is_dir():
        texts, images = folder / TEXTS, folder / IMAGES
    image_by_name = _images_in(images)
    questions: list[Question] = []
    for file in sorted(texts.glob("*.txt")):
        questions += _questions_in(file, images, image_by_name)
    if not questions:
        raise DataError(
            f"{texts} has no text files with questions; expected IMAGE.txt with two lines "
            f"question<TAB>answer beside each image, or in {TEXTS}"
        )
    return questions


def _images_in(folder: Path) -> dict[str, Path]:
    """Returns the images of a folder and its subfolders, by name without suffix.

    The published folder of artwork has its images in a subfolder.
    """
    images = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(file.stem, file)
    return images


def _questions_in(file: Path, images: Path, image_by_name: Mapping[str, Path]) -> list[Question]:
    image = image_by_name.get(file.stem)
    if image is None:
        raise DataError(
            f"{file}: its image {file.stem}{' or '.join(IMAGE_SUFFIXES)} is not in {images}; the "
            f"images of landmark and artwork have to be downloaded separately"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None
    reference = ImageReference(str(image.absolute()))
    questions: list[Question] = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, tab, answer = line.strip().rpartition("\t")
        where = f"{file}:{line_number}"
        if not tab or not text.strip() or answer.strip().lower() not in ("yes", "no"):
            message = f"expected question<TAB>Yes or question<TAB>No, got {line!r:.100}"
            raise DataError(message).in_row(where)
        number = len(questions) + 1
        questions.append(
            Question(reference, image.name, number, text.strip(), answer.strip(), where)
        )
    if len(questions) != QUESTIONS_OF_IMAGE:
        raise DataError(
            f"{file} has {len(questions)} questions; MME has {QUESTIONS_OF_IMAGE} for each image"
        )
    return questions
