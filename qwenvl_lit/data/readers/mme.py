"""MME: two questions about each image, one for yes and one for no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qwenvl_lit.data.readers.prompts import fill_prompt
from qwenvl_lit.data.readers.rows import DEFAULT, ReadOptions, image_from
from qwenvl_lit.data.readers.sources import open_source
from qwenvl_lit.types import Conversation, DataError, Turn

PROMPT = "{image}{question}"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
QUESTIONS_OF_IMAGE = 2
# Subtasks whose images and texts are in two folders; those of the others are side by side.
IMAGES, TEXTS = "images", "questions_answers_YN"


class Question(NamedTuple):
    image: Path
    number: int  # of the question, counted from 1
    text: str
    answer: str
    where: str  # file:line


def read_mme(source: str, read_options: ReadOptions = DEFAULT) -> Sequence[Conversation]:
    """Returns the questions of a subtask of MME in the published layout.

    Args:
        source: the folder of a subtask, such as `MME_Benchmark_release_version/existence`, as in
            `read_rows`. It has the images and, for each of them, a text file of the same name with
            two lines `question<TAB>answer`; or both in the folders `images` and
            `questions_answers_YN`.
    """
    return open_source(source, read_options, lambda folder: Subtask(folder, read_options))


class Subtask(Sequence[Conversation]):
    """The questions of one subtask, sorted by image.

    The id of a row is SUBTASK/IMAGE/NUMBER. The column `image_name` has the name of the image.

    Raises:
        DataError: the folder has no text files, one of them is not in MME's format, or an image is
            missing.
    """

    def __init__(self, folder: Path, read_options: ReadOptions = DEFAULT):
        if not folder.is_dir():
            raise DataError(
                f"{folder} is a file; give the folder of a subtask of MME, such as "
                f"MME_Benchmark_release_version/existence"
            )
        self.folder = folder
        self.read_options = read_options
        self._prompt = read_options.prompt or PROMPT
        fill_prompt(self._prompt, image="", question="")  # check it now
        texts, images = folder, folder
        if (folder / TEXTS).is_dir():
            texts, images = folder / TEXTS, folder / IMAGES
        image_by_name = _images_in(images)
        self._questions: list[Question] = []
        for file in sorted(texts.glob("*.txt")):
            self._questions += _questions_in(file, images, image_by_name)
        if not self._questions:
            raise DataError(
                f"{texts} has no text files with questions; expected IMAGE.txt with two lines "
                f"question<TAB>answer beside each image, or in {TEXTS}"
            )

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        question = self._questions[index]
        try:
            image = image_from(str(question.image.absolute()), Path(), self.read_options)
            parts = fill_prompt(self._prompt, image=image, question=question.text)
        except DataError as error:
            raise error.in_row(question.where) from None
        name = question.image.name
        return Conversation(
            id=f"{self.folder.name}/{name}/{question.number}",
            turns=(
                Turn(role="user", parts=parts),
                Turn(role="assistant", parts=(question.answer,)),
            ),
            columns={"image_name": name},
            index=index,
            where=question.where,
        )


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
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, tab, answer = line.strip().rpartition("\t")
        where = f"{file}:{number}"
        if not tab or not text.strip() or answer.strip().lower() not in ("yes", "no"):
            message = f"expected question<TAB>Yes or question<TAB>No, got {line!r:.100}"
            raise DataError(message).in_row(where)
        questions.append(Question(image, len(questions) + 1, text.strip(), answer.strip(), where))
    if len(questions) != QUESTIONS_OF_IMAGE:
        raise DataError(
            f"{file} has {len(questions)} questions; MME has {QUESTIONS_OF_IMAGE} for each image"
        )
    return questions
