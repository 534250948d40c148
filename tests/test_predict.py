"""Prediction over the rows of a dataset: in batches of like length, in order, and on from where it was interrupted."""

import json
import re

import lightning
import pytest
from PIL import Image
from toy_task import trainer

from qwenvl_lit.callbacks.predictions import PredictionWriter
from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.data.predictions import answered_rows
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn

VISUAL = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "n_queries": 4,
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
}
ROWS = ["a", "bb", "c", "ddd", "ee", "f", "ggg"]


def read(source: str, read_options) -> list[Conversation]:
    """A row for each word, as long as the word has letters; there are three images."""
    return [
        Conversation(
            id=word,
            index=place,
            turns=(
                Turn(
                    role="user",
                    parts=(ImageSource(Image.new("RGB", (9, 9), (place % 3, 0, 0))), 50 * word),
                ),
            ),
        )
        for place, word in enumerate(source.split())
    ]


@pytest.fixture
def task() -> VisionLanguageModule:
    family = QwenVLFamily(
        config={**SIZES, "visual": {**VISUAL, "resampler_heads": 2}}, vocabulary="tiny"
    )
    made = VisionLanguageModule(
        family=family, adapter=None, generation=Generation(max_new_tokens=4), metrics={}
    )
    made.configure_model()
    return made


def data(
    task: VisionLanguageModule, batch_size: int = 2, rows: str = " ".join(ROWS), answered=None
) -> DataModule:
    return DataModule(
        processor=task.processor,
        read=read,
        test=rows,
        eval_batch_size=batch_size,
        answered=answered,
    )


class Asked(lightning.Callback):
    """The ids of each batch; it can be told to break off after some."""

    def __init__(self, batches: int | None = None):
        self.batches, self.ids = batches, []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.ids.append([row.id for row in batch.conversations])
        if len(self.ids) == self.batches:
            raise RuntimeError("the power went")


def written(folder) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_batches_have_rows_of_like_length_and_answers_are_in_order(task, tmp_path):
    together, alone = Asked(), Asked()
    trainer(tmp_path / "two", PredictionWriter(), together).predict(
        task, data(task), return_predictions=False
    )
    assert together.ids == [["ddd", "ggg"], ["bb", "ee"], ["a", "c"], ["f"]]
    assert [row["id"] for row in written(tmp_path / "two")] == ROWS
    trainer(tmp_path / "one", PredictionWriter(), alone).predict(
        task, data(task, 1), return_predictions=False
    )
    assert alone.ids == [[row] for row in ROWS]
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_equal_images_of_neighbouring_batches_are_encoded_once(task, tmp_path):
    encoded = []
    task.model.transformer.visual.register_forward_hook(
        lambda module, args, out: encoded.append(len(out))
    )
    trainer(tmp_path).predict(task, data(task), return_predictions=False)
    assert sum(encoded) == 3


def test_changed_weights_see_images_anew(task, tmp_path):
    rows = DataModule(processor=task.processor, read=read, test="a b", eval_batch_size=2)
    first = trainer(tmp_path)
    first.test(task, rows, verbose=False)
    encoded = []
    task.model.transformer.visual.register_forward_hook(
        lambda module, args, out: encoded.append(len(out))
    )
    trainer(tmp_path).test(task, rows, verbose=False)
    assert sum(encoded) == 2


def test_an_interrupted_prediction_goes_on_where_it_stopped(task, tmp_path, capsys):
    trainer(tmp_path / "whole", PredictionWriter()).predict(
        task, data(task), return_predictions=False
    )
    with pytest.raises(RuntimeError, match="the power went"):
        trainer(tmp_path / "first", PredictionWriter(), Asked(2)).predict(
            task, data(task), return_predictions=False
        )
    assert f"answered={tmp_path / 'first'} answers the other rows" in capsys.readouterr().err
    part = tmp_path / "first" / "predictions.rank0.jsonl"
    with part.open("a") as file:
        file.write('{"set": "test", "index": 0, "id": "a", "predic')  # it was being written
    (tmp_path / "first" / "predictions.rank1.jsonl").write_text(
        json.dumps(written(tmp_path / "whole")[5]) + "\n"
    )  # another rank's: f
    earlier = answered_rows(tmp_path / "first")
    assert {name: sorted(rows) for name, rows in earlier.items()} == {"test": [1, 3, 4, 5, 6]}

    answered = {
        name: {index: row["id"] for index, row in rows.items()} for name, rows in earlier.items()
    }
    rest, asked = data(task, answered=answered), Asked()
    writer = PredictionWriter(answered=str(tmp_path / "first"))
    trainer(tmp_path / "second", writer, asked).predict(task, rest, return_predictions=False)
    assert asked.ids == [["a", "c"]]
    assert written(tmp_path / "second") == written(tmp_path / "whole")
    assert part.exists()


def test_a_prediction_that_was_interrupted_at_its_very_end_becomes_whole(task, tmp_path):
    trainer(tmp_path / "whole", PredictionWriter()).predict(
        task, data(task), return_predictions=False
    )
    rest, asked = data(task, answered={"test": dict(enumerate(ROWS))}), Asked()
    writer = PredictionWriter(answered=str(tmp_path / "whole"))
    trainer(tmp_path / "again", writer, asked).predict(task, rest, return_predictions=False)
    assert asked.ids == [["ggg"]]
    assert written(tmp_path / "again") == written(tmp_path / "whole")


def test_answers_to_other_rows_are_not_taken_over(task, tmp_path):
    other = data(task, rows="a bb x", answered={"test": {2: "c"}})
    with pytest.raises(DataError, match="row 2 of test is 'c', which is 'x' now"):
        trainer(tmp_path).predict(task, other, return_predictions=False)
    other = data(task, rows="a bb x", answered={"test": {3: "ddd"}})
    with pytest.raises(DataError, match="row 3 of test is 'ddd', which does not exist now"):
        trainer(tmp_path).predict(task, other, return_predictions=False)
    with pytest.raises(DataError, match=r"no predictions\.jsonl"):
        answered_rows(tmp_path)


def test_rates_are_told_apart_from_the_start(task, tmp_path, capsys):
    trainer(tmp_path, Throughput()).predict(task, data(task), return_predictions=False)
    rates = r"[\d.]+ images/s, \d+ new tokens/s"
    total, loading = rf"predict: 7 rows in [\d.]+ s, {rates}\n  ", r"loading took [\d.]+ s before\n"
    assert re.fullmatch(
        rf"{total}without the first batch, of [\d.]+ s: {rates}; {loading}", capsys.readouterr().out
    )
    trainer(tmp_path, Throughput()).predict(task, data(task, 7), return_predictions=False)
    assert re.fullmatch(total + loading, capsys.readouterr().out)


def test_a_long_conversation_is_answered_without_its_oldest_images(task):
    encoded = []
    task.model.transformer.visual.register_forward_hook(
        lambda module, args, out: encoded.append(len(out))
    )
    red, blue = (ImageSource(Image.new("RGB", (9, 9), colour)) for colour in ("red", "blue"))
    turns = [
        Turn(role="user", parts=(red, 50 * "long ")),
        Turn(role="assistant", parts=("yes",)),
        Turn(role="user", parts=(blue, "?")),
    ]
    task.processor.max_window_size = 60
    task.eval()
    sample = task.processor.encode(Conversation(id="a", turns=tuple(turns)), prompt=True)
    assert len(sample.vision["pixel_values"]) == 1
    (prediction,) = task.predict(Pad(pad_id=task.processor.pad_id, side="left")([sample]))
    assert encoded == [1]
    assert prediction.tokens <= 4
