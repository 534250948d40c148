"""`python -m qwenvl_lit.predict ckpt=RUN picture=a.png prompt="Where is the car?"`: answer a question, or the rows of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_lit.command import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(config: DictConfig) -> None:
    from pathlib import Path

    from qwenvl_lit import build
    from qwenvl_lit.data.datamodule import DataModule
    from qwenvl_lit.grounding import objects_from_tags
    from qwenvl_lit.types import Conversation, DataError, Picture, Turn

    asked = config.picture is not None or config.prompt is not None
    if asked and config.prompt is None:
        raise DataError('prompt is missing: predict ckpt=... picture=FILE prompt="What is in the picture?"')

    build.seed(config)
    task = build.task(config)
    if asked:
        files = [config.picture] if isinstance(config.picture, str) else list(config.picture or ())
        parts = (*(Picture(Path(file)) for file in files), *objects_from_tags(config.prompt, picture=max(len(files) - 1, 0)))
        question = Conversation(id="question", turns=(Turn(role="user", parts=parts),))
        data = DataModule(processor=task.processor, read=lambda source, root: [question], test="question")
    else:
        data = build.data(config, task.processor)
    task.configure_model()
    build.load_weights(task, config.ckpt)
    trainer = build.trainer(config)
    answers = trainer.predict(task, data, return_predictions=asked)
    if asked:
        [[answer]] = answers
        print(answer.text)
    else:
        print(f"Answered the sets: {', '.join(data.test_names)}.")
    print(f"Written to {build.shown(config.paths.run)}")


if __name__ == "__main__":
    command("predict", main, needs_run=True)
