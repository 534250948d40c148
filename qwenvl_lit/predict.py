"""`python -m qwenvl_lit.predict ckpt=RUN picture=a.png prompt="Where is the car?"`: answer a question, or the rows of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_lit.command import command

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from qwenvl_lit.task import Task
    from qwenvl_lit.types import Prediction


def main(config: DictConfig) -> None:
    from pathlib import Path

    from lightning.pytorch.callbacks import LambdaCallback

    from qwenvl_lit import build
    from qwenvl_lit.callbacks.predictions import earlier_answers
    from qwenvl_lit.data.datamodule import DataModule
    from qwenvl_lit.data.rows import Reading
    from qwenvl_lit.dialogue import conversation
    from qwenvl_lit.runs import find_run
    from qwenvl_lit.types import DataError

    asked = config.picture is not None or config.prompt is not None
    if asked and config.prompt is None:
        raise DataError('prompt is missing: predict ckpt=... picture=FILE prompt="What is in the picture?"')
    if asked and config.answered is not None:
        raise DataError("answered goes with the rows of a dataset, not with a question: leave out picture and prompt, or answered")

    build.start(config)
    task = build.task(config, adapted=config.ckpt is not None)
    if asked:
        files = [config.picture] if isinstance(config.picture, str) else list(config.picture or ())
        reading = Reading(cache=Path(config.paths.cache))
        question = conversation([*({"image": file} for file in files), config.prompt], reading=reading)
        data = DataModule(processor=task.processor, read=lambda source, reading: [question], test={"question": ""})
    else:
        data = build.data(config, task.processor)
    if config.answered is not None:
        earlier = earlier_answers(Path(config.answered))
        data.answered = {name: {index: row["id"] for index, row in rows.items()} for name, rows in earlier.items()}
    task.trained = find_run(config.ckpt).checkpoint if config.ckpt else None
    trainer = build.trainer(config)
    if asked:
        trainer.callbacks.append(LambdaCallback(on_predict_batch_end=print_answers))
    trainer.predict(task, data, return_predictions=False)
    if trainer.is_global_zero:
        answered = "the question" if asked else f"the rows of {', '.join(data.test_names)}"
        print(f"Answers to {answered}, and pictures with boxes: {build.shown(config.paths.run)}")


def print_answers(trainer: Trainer, task: Task, predictions: list[Prediction], *place: object) -> None:
    for prediction in predictions:
        print(f"\n{prediction.text}\n")


if __name__ == "__main__":
    command("predict", main, needs_run=True)
