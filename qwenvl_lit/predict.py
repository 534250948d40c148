"""`python -m qwenvl_lit.predict`: answers one question, or the rows of a dataset."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command
from qwenvl_lit.cli.overrides import value_of
from qwenvl_lit.libraries import import_libraries
from qwenvl_lit.terminal import printable
from qwenvl_lit.types import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lightning import Trainer
    from omegaconf import DictConfig

    from qwenvl_lit.data.datamodule import DataModule
    from qwenvl_lit.training.module import VisionLanguageModule
    from qwenvl_lit.types import Prediction


FIRST_ANSWERS = 3  # of a dataset, printed at the end
ANSWER_CHARACTERS = 200  # of each of them


def main(config: DictConfig) -> None:
    is_question = asks_a_question(config)
    import_libraries()
    from pathlib import Path

    from lightning.pytorch.callbacks import LambdaCallback

    from qwenvl_lit import build
    from qwenvl_lit.data.predictions import FILENAME
    from qwenvl_lit.runs.run import find_run

    build.start(config)
    checkpoint = None
    if config.ckpt:
        run = find_run(config.ckpt, trust=config.trust, verify=config.verify)
        checkpoint = run.checkpoint
    module = build.module(config, adapted=config.ckpt is not None, trained_checkpoint=checkpoint)
    data = question_data(config, module) if is_question else dataset(config, module)
    trainer = build.trainer(config)
    if is_question:
        trainer.callbacks.append(LambdaCallback(on_predict_batch_end=print_answers))
    trainer.predict(module, data, return_predictions=False)
    if trainer.is_global_zero:
        file = Path(config.paths.run, FILENAME)
        answered = "the question" if is_question else f"the rows of {', '.join(data.test_names)}"
        if not is_question and file.exists():
            print("\n".join(first_answers(file)))
        print(f"Answers to {printable(answered)}: {build.shown(str(file))}")
        if (boxes := Path(config.paths.run, "boxes")).exists():
            print(f"Images with boxes: {build.shown(str(boxes))}")


def asks_a_question(config: DictConfig) -> bool:
    """Whether the config asks one question, instead of naming the rows of a dataset.

    Raises:
        DataError: it has an image and no question.
    """
    if config.image is not None and config.prompt is None:
        raise DataError(
            'prompt is missing: predict ckpt=... image=FILE prompt="What is in the picture?"'
        )
    return config.prompt is not None


def question_data(config: DictConfig, module: VisionLanguageModule) -> DataModule:
    """One row: the question of the command line with its images."""
    from pathlib import Path

    from qwenvl_lit.data.datamodule import DataModule
    from qwenvl_lit.data.readers.question import conversation, question_options

    files = [config.image] if isinstance(config.image, str) else list(config.image or ())
    query = [*({"image": file} for file in files), config.prompt]
    read_options = question_options(Path(config.paths.cache), config.data)
    row = conversation(query, read_options=read_options)
    return DataModule(
        processor=module.processor,
        read=lambda source, read_options: [row],
        test={"question": ""},
    )


def dataset(config: DictConfig, module: VisionLanguageModule) -> DataModule:
    """The rows of the config's data, without those that `answered=` holds answers to."""
    from pathlib import Path

    from qwenvl_lit import build
    from qwenvl_lit.data.predictions import answered_rows

    answered: dict[str, dict[int, str]] = {}
    if config.answered is not None:
        for name, rows in answered_rows(Path(config.answered)).items():
            answered[name] = {index: row["id"] for index, row in rows.items()}
    return build.data(config, module.processor, answered=answered)


def first_answers(file: Path) -> Iterator[str]:
    """Yields the first answers of a predictions file, each as a line that begins with the row's id.

    Long answers are cut and end in an ellipsis.
    """
    from itertools import islice

    from qwenvl_lit.data.predictions import prediction_rows

    for row in islice(prediction_rows(file), FIRST_ANSWERS):
        answer = " ".join(row["prediction"].split())
        if len(answer) > ANSWER_CHARACTERS:
            answer = answer[: ANSWER_CHARACTERS - 1] + "…"
        yield printable(f"{row['id']}: {answer}")


def print_answers(
    trainer: Trainer, module: VisionLanguageModule, predictions: list[Prediction], *_: object
) -> None:
    for prediction in predictions:
        text = prediction.text
        if sys.stdout.isatty():
            text = printable(text, keep="\n\t")
        print(f"\n{text}\n")


def adjust_arguments(arguments: list[str]) -> list[str]:
    """Refuses a dataset beside a question; a named test file replaces the run's validation rows.

    Raises:
        DataError: the arguments ask a question and name rows of a dataset.
    """
    has_prompt = value_of(arguments, "prompt") is not None
    for argument in arguments:
        about_rows = argument.startswith(("data=", "data.", "answered="))
        if about_rows and has_prompt and not argument.endswith("=null"):
            has_image = value_of(arguments, "image") is not None
            question = "image= with prompt=" if has_image else "prompt="
            raise DataError(
                f"{question} asks one question, and {argument} is for the rows of a dataset: "
                f"give one or the other"
            )
    if value_of(arguments, "data.test") is not None:
        return [*arguments, "data.validation=null"]
    return arguments


if __name__ == "__main__":
    command("predict", main, run="needed", adjust=adjust_arguments)
