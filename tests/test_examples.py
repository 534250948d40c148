"""The examples of the documentation, chosen by the config files beside them as a user would."""

import ast
import importlib
import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose_config
from hydra.utils import instantiate
from PIL import Image
from scripted import tiny_checkpoint
from toy_task import ToyData, ToyTask, conversation, grounded, trainer

from qwenvl_lit import QwenVL, build
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.types import (
    Box,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Prediction,
    Turn,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
OWN_FILES = f"hydra.searchpath=[file://{EXAMPLES}/conf]"  # what --config-dir adds


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def composed(*overrides):
    return compose_config("train", OWN_FILES, *overrides)


def dataset(folder, *overrides) -> DatasetSpec:
    """The dataset of a config, as `DataModule` builds it, with its files in `folder`."""
    config = composed(*overrides, f"paths.run={folder}/run", f"paths.cache={folder}")
    settings = instantiate(config.data, _convert_="all").keywords
    known = set(DatasetSpec.__dataclass_fields__) & set(settings)
    return DatasetSpec(**{name: settings[name] for name in known})


def test_each_config_file_has_a_comment_and_names_an_example():
    for file in EXAMPLES.rglob("*.yaml"):
        text = file.read_text()
        assert text.startswith("# ")
        targets = [line.split(": ")[1] for line in text.splitlines() if "_target_:" in line]
        for target in targets:
            module, name = target.split(".")
            tree = ast.parse((EXAMPLES / f"{module}.py").read_text())
            assert name in [getattr(node, "name", None) for node in tree.body]


def test_the_pages_show_what_the_files_have():
    page = (EXAMPLES.parent / "docs/extending.md").read_text()
    sources = "\n".join(file.read_text() for file in EXAMPLES.glob("*.py"))
    for block in re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        method = textwrap.indent(block, "    ")
        assert block in sources or method in sources, block
    files = [file.read_text() for file in EXAMPLES.rglob("*.yaml")]
    for block in re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        assert any(text.endswith(f"\n{block}") for text in files), block
    page += (EXAMPLES.parent / "docs/looking_inside.md").read_text()
    for file in EXAMPLES.rglob("*.*"):
        assert file.is_dir() or file.suffix in (".yaml", ".pyc") or file.name in page, file


def test_a_metric_of_ones_own_scores_answers(caplog):
    metrics = build.metrics(composed("data=jsonl", "metrics=word_overlap"))
    assert list(metrics) == ["exact_match", "word_overlap"]
    metric = metrics["word_overlap"]
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
    settings = ["data.exif=apply", "data.validation=null", f"data.train={tmp_path}"]
    captions = dataset(tmp_path, "data=captioned_folder", *settings)
    [rows] = captions.open_training().stages
    assert [row.id for row in rows] == ["a", "b"]
    assert rows[1].answer.parts == ("caption b",)
    assert rows[1].images == (ImageSource(tmp_path / "b.png", captions.read_options.image_options),)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b.png has no caption; write it to .*b.txt"):
        captions.open_training()


def test_a_callback_of_ones_own_gets_predictions(tmp_path):
    config = composed("callbacks=[train,long_answers]", "callbacks.long_answers.count=2")
    callback = instantiate(config.callbacks.long_answers)
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


def test_a_layout_of_ones_own_is_read_with_its_boxes_and_named_in_errors(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    row = {"photo": "a.png", "defect": "a scratch", "xyxy": [8, 8, 40, 20]}
    faults = [{**row, "xyxy": None}, {**row, "xyxy": [8, 8, 99, 20]}, {**row, "photo": "b.png"}]
    lines = [json.dumps(each) + "\n" for each in (row, *faults)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    defects = dataset(tmp_path, "data=defects")
    [rows] = defects.read(f"{tmp_path}/rows.jsonl#1", defects.read_options)
    assert rows.images[0].size == (64, 48)
    assert rows.answer.parts == (grounded("a scratch", 8, 8, 40, 20, frame="pixel"),)
    rows = defects.read(f"{tmp_path}/rows.jsonl", defects.read_options)
    messages = ["has no `xyxy`", "is not within its image", "b.png"]
    for index, message in enumerate(messages, 1):
        with pytest.raises(DataError, match=rf"rows.jsonl:{index + 1}.*{message}"):
            rows[index]


def test_a_dataset_of_ones_own_is_written_once(tmp_path):
    cards = dataset(tmp_path, "data=color_cards")
    cards.prepare_files()
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jsonl")}
    cards.prepare_files()
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jsonl")}
    opened = cards.open_training()
    assert (sum(map(len, opened.stages)), len(opened.validation)) == (12, 4)
    [row] = cards.read("test.jsonl#1", cards.read_options)
    assert row.columns == {"size": "plain"}
    assert row.images[0].open().size == (64, 64)


def test_an_adapter_of_ones_own_trains_its_tensors_and_is_merged():
    config = composed("adapter=bias_only", "data=jsonl")
    family, adapter = instantiate(config.model), instantiate(config.adapter)
    model = adapter.apply(family.load(), family)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trained == {f"transformer.h.{block}.attn.c_attn.bias" for block in (0, 1)}
    assert adapter.merge(model) is model
    adapter.component = "tower"
    with pytest.raises(ValueError, match=r"^adapter.component is one of vision, resampler, "):
        adapter.apply(model, family)


def test_a_model_of_ones_own_is_trained_and_answers_with_its_template():
    family = instantiate(composed("model=question_answer_tiny", "data=jsonl").model)
    processor = family.processor()
    box = GroundedObject(label="dog", boxes=(Box(x0=1, y0=2, x1=30, y1=40, frame="pixel"),))
    question = Turn(role="user", parts=(ImageSource(Image.new("RGB", (64, 64))), "Find the dog"))
    row = Conversation(id="1", turns=(question, Turn(role="assistant", parts=(box,))))
    sample = processor.encode(row)
    ids = [each for each in sample.input_ids if each != processor.tokenizer.special["<imgpad>"]]
    end = "<|endoftext|>"
    answer = "<ref>dog</ref><box>(15,31),(468,624)</box>"
    asked = "Question: Picture 1: <img></img>\nFind the dog\nAnswer: "
    assert processor.tokenizer.decode(ids) == f"{asked}{answer}{end}"
    supervised = [each for each in sample.labels if each != -100]
    assert processor.tokenizer.decode(supervised) == f"{answer}{end}"
    pad = Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision)
    loss = family.load()(**family.inputs(pad([sample]))).loss
    assert torch.isfinite(loss)
    prompt = processor.encode(row, prompt=True)
    assert sample.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
    assert processor.stop_ids == (processor.tokenizer.pad_id,)
    assert processor.decode(supervised[:-1], row).text == answer


def test_the_settings_of_ones_own_model_for_published_weights_are_those_of_its_file():
    model = composed("model=question_answer").model
    assert (model.path, model.system, model.too_long) == ("Qwen/Qwen-VL", "none", "drop")
