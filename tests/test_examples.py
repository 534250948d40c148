"""The examples of docs/extending.md, named by configs as a user would name them."""

import json
from pathlib import Path

import pytest
from commands import compose_config
from hydra.utils import instantiate
from PIL import Image
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit import build
from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.types import Conversation, DataError, ImageSource, Prediction


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")


def test_a_metric_of_ones_own_scores_answers(caplog):
    config = compose_config("train", "data=jsonl", "+metrics.own._target_=word_overlap.WordOverlap")
    metric = build.metrics(config)["own"]
    answers = {"a brown dog": ("A dog", "one cat"), "cat": ("a cat",), "?": (), "x": ("",)}
    for text, references in answers.items():
        row = Conversation(id=text, turns=(), references=references)
        metric.update([Prediction(conversation=row, text=text, parts=(text,))])
    assert metric.compute() == 0.75
    assert "2 of 4 rows left out, they have no expected answer" in caplog.text


def test_a_reader_of_ones_own_reads_a_folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    config = compose_config(
        "train", "data=jsonl", "data.read._target_=captioned_folder.read_captions"
    )
    dataset = DatasetSpec(read=instantiate(config.data.read), train=str(tmp_path), exif="apply")
    [rows] = dataset.open_training().stages
    assert [row.id for row in rows] == ["a", "b"]
    assert rows[1].answer.parts == ("caption b",)
    assert rows[1].images == (ImageSource(tmp_path / "b.png", dataset.read_options.image_options),)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b.png has no caption; write it to .*b.txt"):
        dataset.open_training()


def test_a_callback_of_ones_own_gets_predictions(tmp_path):
    target = "+callbacks.own._target_=long_answers.LongAnswers"
    config = compose_config("train", target, "+callbacks.own.count=2")
    callback = instantiate(config.callbacks.own)
    rows = [conversation(index, says="yes" * index) for index in range(1, 4)]
    trainer(tmp_path, callback).test(ToyTask(), ToyData(test={"test": rows}), verbose=False)
    lines = (tmp_path / "long_answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [rows[2].id, rows[1].id]
