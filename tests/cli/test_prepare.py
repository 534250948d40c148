"""Arguments as Hydra gets them. No process is started."""

from pathlib import Path

import pytest
import torch
from small_demo import SIZES

from qwenvl_lit import predict, test
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.cli.demo_data import FILES
from qwenvl_lit.data.demo.dataset import write_demo
from qwenvl_lit.types import DataError

CONFIG = {
    "model": {
        "_target_": "qwenvl_lit.models.qwen_vl.family.QwenVLFamily",
        "path": "M",
        "template": "chatml",
    },
    "adapter": {"rank": 3},
    "init": {},
    "data": {"split_file": "old/split.json", "datasets": {"a": {"split_file": "old/split_a.json"}}},
    "metrics": {},
    "generation": {
        "_target_": "qwenvl_lit.generation.generation.Generation",
        "max_new_tokens": 4,
    },
    "optim": {"lr": 1e-4},
    "trainer": {"max_steps": 5, "devices": 2, "strategy": "ddp"},
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The run folder `mine`, and a link `model.ckpt` to its checkpoint, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    for name in (".hydra", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text("seed: 1")
    (folder / ".hydra/overrides.yaml").write_text("[]")
    torch.save({"config": CONFIG, "state_dict": {}}, folder / "checkpoints/last.ckpt")
    (tmp_path / "model.ckpt").symlink_to(folder / "checkpoints/last.ckpt")
    return folder


def test_free_text_is_quoted_and_preparing_twice_changes_nothing():
    line = prepare("train", ["data=jsonl", "data.train=my file.jsonl"])
    assert line.arguments == ["data=jsonl", "data.train='my file.jsonl'"]
    assert prepare("train", line.arguments) == line


def test_groups_that_the_command_line_does_not_choose_come_from_the_run(run):
    line = prepare("predict", ["seed=1", "ckpt=model.ckpt"], run="needed")
    seed, ckpt, *_ = line.arguments
    assert seed == "seed=1"
    assert ckpt.startswith("ckpt='")
    assert ckpt.endswith(".ckpt'")
    assert line.run_groups["adapter"] == {"rank": 3}
    assert line.run_groups["generation"] == CONFIG["generation"]
    assert "trainer" not in line.run_groups
    assert prepare("predict", line.arguments, run="needed").arguments == line.arguments


def test_training_from_a_run_uses_its_weights_and_recipe_but_not_its_devices(run):
    line = prepare("train", ["ckpt=model.ckpt", "seed=1"], run="start")
    assert line.arguments[1:] == ["init=run", "model=run", "seed=1"]
    assert line.run_groups["init"]["checkpoint"].endswith(".ckpt")
    assert line.run_groups["trainer"] == {"max_steps": 5}
    assert line.run_groups["adapter"] == {
        "defaults": [{"override /optim@_global_.optim": "run"}, "_self_"],
        "rank": 3,
    }
    other_model = prepare("train", ["ckpt=model.ckpt", "model=qwen_vl_tiny"], run="start")
    assert other_model.arguments[1:] == ["init=run", "model=qwen_vl_tiny"]


def test_a_resumed_run_continues_in_its_folder(run):
    line = prepare("train", ["resume=mine", "trainer.max_steps=9"], run="start")
    assert line.arguments == [
        "trainer.max_steps=9",
        "resume='mine'",
        "hydra.run.dir='mine'",
        "hydra.output_subdir=null",
    ]


def test_a_command_needs_a_run_or_a_published_model():
    assert prepare("test", ["model=qwen_vl_tiny"], run="needed").run_groups["model"] == {}
    assert prepare("test", ["--help"], run="needed").arguments == ["--help"]
    with pytest.raises(DataError, match=r"ckpt is missing: python -m qwenvl_lit\.test ckpt=RUN"):
        prepare("test", ["seed=1"], run="needed")


@pytest.mark.parametrize(
    ("arguments", "adjusted"),
    [
        (["seed=1"], ["seed=1"]),
        (["ckpt=x", "compare=['a']"], ["ckpt=x", "compare=['a']"]),
        (["ckpt=x", "compare='a, b'"], ["ckpt=x", "compare=['a, b']"]),
        (["ckpt=x", "compare=null"], ["ckpt=x", "compare=null"]),
        (
            ["compare=['a b','c','d']", "seed=1"],
            ["compare=['a b','c']", "predictions='d'", "seed=1"],
        ),
        (["benchmarks=[vqav2/val]"], ["benchmarks=[vqav2/val]", "data=jsonl"]),
        (["benchmarks=[vqav2/val]", "data=demo"], ["benchmarks=[vqav2/val]", "data=demo"]),
        (
            ["benchmarks=[mme]", "data=jsonl", "data.read.parquet='a'"],
            ["benchmarks=[mme]", "data=jsonl", "++data.read.parquet='a'"],
        ),
    ],
)
def test_test_completes_what_its_arguments_imply(arguments, adjusted):
    assert test.adjust_arguments(arguments) == adjusted


def test_answers_without_the_config_of_their_run_need_a_model(tmp_path):
    (tmp_path / "predictions.jsonl").touch()
    arguments = [f"predictions={tmp_path}"]
    with pytest.raises(DataError, match=r"has no \.hydra/config\.yaml, .* or model="):
        prepare("test", arguments, run="needed")
    assert prepare("test", [*arguments, "model=qwen_vl_tiny"], run="needed").run_groups


def test_one_folder_cannot_be_compared():
    for argument in ("compare=['a']", "compare='a'"):
        with pytest.raises(DataError, match="two runs at least"):
            test.adjust_arguments([argument])


def test_predict_takes_a_question_or_rows():
    rows = predict.adjust_arguments(["data.test='a.jsonl'"])
    assert rows == ["data.test='a.jsonl'", "data.validation=null"]
    assert predict.adjust_arguments(["data.test=null"]) == ["data.test=null"]
    with pytest.raises(DataError, match=r"image= with prompt= asks one question, and data=demo is"):
        predict.adjust_arguments(["prompt='Hi'", "image='a.png'", "data=demo"])


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    "argument",
    [
        "data.train=mine.jsonl",
        "data.train=[train.jsonl,mine.jsonl#5]",
        "data.validation=v.jsonl",
        "data.test={easy: mine.jsonl}",
    ],
)
def test_own_files_without_data_jsonl_are_refused(command, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"is not a file of the demo.*: data=jsonl data\."):
        prepare(command, [argument])
    for choice in ("data=jsonl", "data=mixture"):
        prepare(command, [choice, argument])


def test_the_demo_may_be_trained_on_some_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare("train", ["data.train=[train_single.jsonl#16,train.jsonl#40]", "data.validation=5"])
    (tmp_path / "train.jsonl").touch()  # in the current folder: a file of the user
    with pytest.raises(DataError, match=r"for your own files: data=jsonl data\.train=train\.jsonl"):
        prepare("train", ["data.train=train.jsonl"])


def test_the_files_of_the_demo_are_those_that_it_writes(tmp_path):
    folder = write_demo(tmp_path / "demo", **dict.fromkeys(SIZES, 8))
    assert {file.name for file in folder.glob("*.jsonl")} == set(FILES)
