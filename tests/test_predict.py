"""Prediction over the rows of a dataset: batches, order, and resuming after an interrupt."""

import json
import re
from pathlib import Path

import lightning
import pytest
from commands import read_json_lines
from PIL import Image
from tiny import tiny_family
from toy_task import trainer

from qwenvl_lit.callbacks.predictions import PredictionWriter
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.predictions import answered_rows
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.predict import first_answers
from qwenvl_lit.reports.scores import read_predictions
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn

ROWS = ["a", "bb", "c", "ddd", "ee", "f", "ggg"]


def read_words(source: str, read_options) -> list[Conversation]:
    """Makes each word a row as long as the word; every third row has the same image."""
    rows = []
    for index, word in enumerate(source.split()):
        image = ImageSource(Image.new("RGB", (9, 9), (index % 3, 0, 0)))
        question = Turn(role="user", parts=(image, 50 * word))
        rows.append(Conversation(id=word, index=index, turns=(question,)))
    return rows


@pytest.fixture
def module() -> VisionLanguageModule:
    generation = Generation(max_new_tokens=4)
    module = VisionLanguageModule(
        family=tiny_family(), adapter=None, generation=generation, metrics={}
    )
    module.configure_model()
    return module


@pytest.fixture
def encoded_images(module) -> list[int]:
    """A list that receives the number of images of each call of the vision tower."""
    counts = []

    def count(tower, arguments, features):
        counts.append(len(features))

    module.model.transformer.visual.register_forward_hook(count)
    return counts


def data(module, *, batch_size: int = 2, rows=ROWS, answered=None) -> DataModule:
    return DataModule(
        processor=module.processor,
        read=read_words,
        test=" ".join(rows),
        eval_batch_size=batch_size,
        answered=answered,
    )


class RecordIds(lightning.Callback):
    """Records the ids of each batch; raises an error after `stop_after` batches."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.ids = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.ids.append([row.id for part in batch for row in part.conversations])
        if len(self.ids) == self.stop_after:
            raise RuntimeError("power failure")


def predict(folder: Path, module, datamodule: DataModule, *callbacks) -> None:
    trainer(folder, *callbacks).predict(module, datamodule, return_predictions=False)


def written(folder: Path) -> list[dict]:
    return read_json_lines(folder / "predictions.jsonl")


def test_batches_have_rows_of_similar_length_and_predictions_are_in_order(module, tmp_path):
    batched, single = RecordIds(), RecordIds()
    predict(tmp_path / "batched", module, data(module), PredictionWriter(), batched)
    assert batched.ids == [["ddd", "ggg"], ["bb", "ee"], ["a", "c"], ["f"]]
    assert [row["id"] for row in written(tmp_path / "batched")] == ROWS
    predict(tmp_path / "single", module, data(module, batch_size=1), PredictionWriter(), single)
    assert single.ids == [[row] for row in ROWS]
    assert written(tmp_path / "single") == written(tmp_path / "batched")


def test_equal_images_of_neighbouring_batches_are_encoded_once(module, encoded_images, tmp_path):
    predict(tmp_path, module, data(module))
    assert sum(encoded_images) == 3


def test_another_test_encodes_images_again(module, encoded_images, tmp_path):
    """The weights may have changed in between."""
    rows = data(module, rows=["a", "b"])
    trainer(tmp_path).test(module, rows, verbose=False)
    encoded_images.clear()
    trainer(tmp_path).test(module, rows, verbose=False)
    assert sum(encoded_images) == 2


def test_an_interrupted_prediction_resumes_where_it_stopped(module, tmp_path, capsys):
    complete, interrupted = tmp_path / "complete", tmp_path / "interrupted"
    predict(complete, module, data(module), PredictionWriter())
    with pytest.raises(RuntimeError, match="power failure"):
        predict(interrupted, module, data(module), PredictionWriter(), RecordIds(stop_after=2))
    assert f"answered={interrupted}, and another hydra.run.dir= if" in capsys.readouterr().err
    rank_file = interrupted / "predictions.rank0.jsonl"
    with rank_file.open("a") as file:
        file.write('{"set": "test", "index": 0, "id": "a", "predic')  # an unfinished line
    row_of_other_rank = json.dumps(written(complete)[5]) + "\n"
    (interrupted / "predictions.rank1.jsonl").write_text(row_of_other_rank)
    earlier = answered_rows(interrupted)
    assert list(earlier) == ["test"]
    assert sorted(earlier["test"]) == [1, 3, 4, 5, 6]

    answered = {"test": {index: row["id"] for index, row in earlier["test"].items()}}
    recorder, writer = RecordIds(), PredictionWriter(answered=str(interrupted))
    predict(tmp_path / "resumed", module, data(module, answered=answered), writer, recorder)
    assert recorder.ids == [["a", "c"]]
    assert written(tmp_path / "resumed") == written(complete)
    assert rank_file.exists()


def test_a_prediction_whose_rows_are_all_answered_becomes_complete(module, tmp_path):
    complete = tmp_path / "complete"
    predict(complete, module, data(module), PredictionWriter())
    all_rows = {"test": dict(enumerate(ROWS))}
    recorder, writer = RecordIds(), PredictionWriter(answered=str(complete))
    predict(tmp_path / "resumed", module, data(module, answered=all_rows), writer, recorder)
    assert recorder.ids == [[]]  # one batch without rows; nothing is answered again
    assert written(tmp_path / "resumed") == written(complete)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_answers_are_scored_whatever_line_separators_the_questions_hold(
    character, module, tmp_path
):
    rows = [
        Conversation(
            id=f"{name}{character}",
            turns=(
                Turn(role="user", parts=(f"a{character}b",)),
                Turn(role="assistant", parts=(f"c{character}",)),
            ),
        )
        for name in "xy"
    ]
    datamodule = DataModule(
        processor=module.processor, read=lambda source, read_options: rows, test="any"
    )
    predict(tmp_path, module, datamodule, PredictionWriter())
    predictions = read_predictions(tmp_path / "predictions.jsonl", {"test": rows}, module.processor)
    assert [row.conversation.id for row in predictions["test"]] == [row.id for row in rows]
    assert [row.reference for row in predictions["test"]] == [f"c{character}"] * 2


def test_answers_to_other_rows_are_refused(module, tmp_path):
    rows = ["a", "bb", "x"]
    changed = data(module, rows=rows, answered={"test": {2: "c"}})
    with pytest.raises(DataError, match="row 2 of test is 'c', which is 'x' now"):
        predict(tmp_path, module, changed)
    missing = data(module, rows=rows, answered={"test": {3: "ddd"}})
    with pytest.raises(DataError, match="row 3 of test is 'ddd', which does not exist now"):
        predict(tmp_path, module, missing)
    with pytest.raises(DataError, match=r"no predictions\.jsonl"):
        answered_rows(tmp_path)


def test_speed_is_printed_with_and_without_the_first_batch(module, tmp_path, capsys):
    predict(tmp_path, module, data(module), Throughput())
    speed = r"[\d.]+ images/s, \d+ new tokens/s"
    total = rf"predict: 7 rows in [\d.]+ s, {speed}\n  "
    loading = r"loading took [\d.]+ s before that\n"
    assert re.fullmatch(total + loading, capsys.readouterr().out), "too few batches for a rate"
    predict(tmp_path, module, data(module, rows=["a"] * 11, batch_size=1), Throughput())
    after_first = rf"10 batches after the first, which took [\d.]+ s: {speed}; "
    total = total.replace("7 rows", "11 rows")
    assert re.fullmatch(total + after_first + loading, capsys.readouterr().out)


def test_a_conversation_that_is_too_long_is_answered_without_its_oldest_images(
    module, encoded_images
):
    red, blue = (ImageSource(Image.new("RGB", (9, 9), color)) for color in ("red", "blue"))
    turns = (
        Turn(role="user", parts=(red, 50 * "long ")),
        Turn(role="assistant", parts=("yes",)),
        Turn(role="user", parts=(blue, "?")),
    )
    module.processor.max_window_size = 60
    module.eval()
    sample = module.processor.encode(Conversation(id="a", turns=turns), prompt=True)
    assert len(sample.vision["pixel_values"]) == 1
    batch = Pad(
        pad_id=module.processor.pad_id, collate_vision=module.processor.collate_vision, side="left"
    )([sample])
    (prediction,) = module.predict(batch)
    assert batch.images == (blue,)
    module.predict(batch)
    assert encoded_images == [1], "the features of an image are kept under its key"
    assert prediction.tokens <= 4


def test_the_first_answers_are_printed_as_a_line_each(tmp_path):
    answers = ("a  dog\non grass", "x" * 300, "\x1b[31mred", "not shown")
    rows = []
    for index, answer in enumerate(answers):
        row = {"set": "test", "index": index, "id": f"row {index}", "prediction": answer}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "predictions.jsonl").write_text("".join(rows))
    assert list(first_answers(tmp_path / "predictions.jsonl")) == [
        "row 0: a dog on grass",
        f"row 1: {'x' * 199}…",
        r"row 2: \x1b[31mred",
    ]
