"""What becomes of a command line before Hydra sees it; no process is needed."""

from pathlib import Path

import pytest
import torch

from qwenvl_lit import predict, test
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.types import DataError

CONFIG = {
    "model": {"path": "M", "template": "chatml"},
    "adapter": {"rank": 3},
    "init": {},
    "data": {"split_file": "old/split.json", "datasets": {"a": {"split_file": "old/split_a.json"}}},
    "metrics": {},
    "generation": {"max_new_tokens": 4},
    "optim": {"lr": 1e-4},
    "trainer": {"max_steps": 5, "devices": 2, "strategy": "ddp"},
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder with a checkpoint, seen from its parent."""
    monkeypatch.chdir(tmp_path)
    for name, text in ((".hydra/config.yaml", "seed: 1"), (".hydra/overrides.yaml", "[]")):
        file = tmp_path / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "mine/checkpoints").mkdir()
    torch.save({"config": CONFIG, "state_dict": {}}, tmp_path / "mine/checkpoints/last.ckpt")
    (tmp_path / "model.ckpt").symlink_to(tmp_path / "mine/checkpoints/last.ckpt")
    return tmp_path / "mine"


def test_free_text_is_quoted_and_preparing_twice_changes_nothing():
    line = prepare("train", ["seed=1", "data.train=my file.jsonl"])
    assert line.arguments == ["seed=1", "data.train='my file.jsonl'"]
    assert prepare("train", line.arguments) == line


def test_groups_that_the_command_line_does_not_choose_come_from_the_run(run):
    line = prepare("predict", ["seed=1", "ckpt=model.ckpt"], run="needed")
    assert line.arguments[0] == "seed=1"
    assert line.arguments[1].startswith("ckpt='") and line.arguments[1].endswith(".ckpt'")
    assert line.run_groups["adapter"] == {"rank": 3}
    assert line.run_groups["generation"] == {"max_new_tokens": 4}
    assert "trainer" not in line.run_groups
    assert prepare("predict", line.arguments, run="needed").arguments == line.arguments


def test_training_from_a_run_takes_its_weights_and_its_recipe_but_not_its_machine(run):
    line = prepare("train", ["ckpt=model.ckpt", "seed=1"], run="start")
    assert line.arguments[1:] == ["init=run", "model=run", "seed=1"]
    assert line.run_groups["init"]["checkpoint"].endswith(".ckpt")
    assert line.run_groups["trainer"] == {"max_steps": 5}
    assert line.run_groups["adapter"] == {
        "defaults": [{"override /optim@_global_.optim": "run"}, "_self_"],
        "rank": 3,
    }
    own_model = prepare("train", ["ckpt=model.ckpt", "model=qwen_vl_tiny"], run="start")
    assert own_model.arguments[1:] == ["init=run", "model=qwen_vl_tiny"]


def test_a_resumed_run_is_run_in_its_folder(run):
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
        (
            ["compare=['a b','c','d']", "seed=1"],
            ["compare=['a b','c']", "predictions='d'", "seed=1"],
        ),
        (["benchmarks=[vqav2/val]"], ["benchmarks=[vqav2/val]", "data=jsonl"]),
        (["benchmarks=[vqav2/val]", "data=demo"], ["benchmarks=[vqav2/val]", "data=demo"]),
    ],
)
def test_what_test_alone_makes_of_its_arguments(arguments, adjusted):
    assert test.adjust_arguments(arguments) == adjusted


def test_one_folder_cannot_be_compared():
    with pytest.raises(DataError, match="two runs at least"):
        test.adjust_arguments(["compare=['a']"])


def test_predict_takes_a_question_or_rows():
    assert predict.adjust_arguments(["data.test='a.jsonl'"]) == [
        "data.test='a.jsonl'",
        "data.validation=null",
    ]
    assert predict.adjust_arguments(["data.test=null"]) == ["data.test=null"]
    with pytest.raises(DataError, match=r"image= with prompt= asks one question, and data=demo is"):
        predict.adjust_arguments(["prompt='Hi'", "image='a.png'", "data=demo"])
