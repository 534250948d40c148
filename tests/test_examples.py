"""The examples of the documentation, named by configs or called as a user would."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose_config
from hydra.utils import instantiate
from PIL import Image
from scripted import tiny_checkpoint
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit import QwenVL, build
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


@pytest.fixture
def model(tmp_path) -> QwenVL:
    return QwenVL.load(tiny_checkpoint(tmp_path / "tiny"), dtype="float32")


def test_attention_is_drawn_and_listed(model, tmp_path, capsys):
    example = importlib.import_module("look_at_attention")
    Image.new("RGB", (40, 20), "teal").save(tmp_path / "a.png")
    model.generation = replace(model.generation, max_new_tokens=3, min_new_tokens=3)
    example.look(model, str(tmp_path / "a.png"), "What is it?", str(tmp_path / "looks.png"))
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ *\d+\.\d%  '.*'$", printed, re.MULTILINE)) == 3
    assert Image.open(tmp_path / "looks.png").width > 300


def test_contrastive_decoding_subtracts_the_scores_of_the_noised_image(model, monkeypatch):
    example = importlib.import_module("contrastive_decoding")
    scores = torch.tensor([[5.0, 4.9, 4.0, 0.0], [5.0, 3.0, 0.0, -9.0]])
    contrast = example.Contrast()(torch.zeros(2, 3), scores.clone())
    # 2 * 5 - 5, 2 * 4.9 - 3, 2 * 4 - 0; the last is less likely than a tenth of the first
    torch.testing.assert_close(contrast, torch.tensor([[5.0, 6.8, 8.0, -torch.inf]] * 2))
    image = Image.new("RGB", (900, 600), (200, 40, 40))
    noised = example.noised(image.resize((64, 64)))
    assert noised.size == (64, 64)
    assert np.asarray(noised, dtype=float).std() > 20
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    answer = example.answer(model, image, "Is there a cat?", **settings)
    assert answer.new_tokens == 4
    monkeypatch.setattr(
        example, "noised", lambda image: image
    )  # nothing to subtract but the scores themselves
    same = example.answer(model, image, "Is there a cat?", **settings)
    small = image.resize((448, 299))
    assert same == model.generate([[small, "Is there a cat?"]], **settings)[0]
