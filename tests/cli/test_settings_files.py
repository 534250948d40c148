"""Files and words where `key=value` is expected. No process is started."""

import pytest

from qwenvl_lit.cli.command import prepare
from qwenvl_lit.cli.settings_files import refuse_files
from qwenvl_lit.types import DataError

OTHER_PROGRAM = """
model_name_or_path: /models/Qwen-VL-Chat
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: mllm_demo
cutoff_len: 2048
num_train_epochs: 3.0
resume_from_checkpoint: null
seed: 7
mix_strategy: concat
"""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["sft.yaml"]),
        ("train", ["seed=3", "conf/sft.yml", "optim.lr=1"]),
        ("train", ["-m", "sft.yaml"]),
        ("train", ["--config", "sft.yaml"]),
        ("train", ["--config=sft.yaml"]),
        ("train", ["--config-name", "sft"]),
        ("train", ["--config-dir", ".", "--config-name", "sft"]),
        ("train", ["-cn", "sft.yaml"]),
        ("train", ["experiment=./sft.yaml"]),
        ("chat", ["sft.yaml"]),
    ],
)
def test_a_file_of_settings_is_answered_with_the_way_to_use_it(command, arguments):
    with pytest.raises(DataError) as raised:
        prepare(command, arguments)
    text = str(raised.value)
    plus = "" if command == "train" else "+"
    assert f"run python -m qwenvl_lit.{command} --config-dir=my_conf {plus}experiment=sft (" in text
    assert "\n" not in text


def test_the_settings_of_another_program_are_given_as_arguments(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text(OTHER_PROGRAM)
    with pytest.raises(DataError) as raised:
        refuse_files("train", [str(file)])
    assert str(raised.value).endswith(
        "As arguments, its settings are: model=qwen_vl_chat model.path=/models/Qwen-VL-Chat "
        "adapter=lora_all data=jsonl data.train=FILE model.max_length=2048 trainer.max_epochs=3 "
        "seed=7; nothing is needed for stage, do_train; nothing here stands for mix_strategy"
    )


@pytest.mark.parametrize("text", ["[", "- a\n", "text", "optim: {lr: 1}\n", ""])
def test_other_files_get_the_way_alone(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=r"has an example\)$"):
        refuse_files("train", [str(file)])


@pytest.mark.parametrize(
    ("command", "word", "meant"),
    [
        ("train", "a.jsonl", "data=jsonl data.train=a.jsonl"),
        ("test", "a.csv#5", "data=jsonl data.test=a.csv#5"),
        ("predict", "dog.png", "image=dog.png"),
        ("chat", "run", "ckpt=run"),
        ("train", "help", "see python -m qwenvl_lit.train --help"),
    ],
)
def test_a_word_without_a_key_gets_the_key_that_was_meant(
    command, word, meant, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "dog.png").touch()
    with pytest.raises(DataError) as raised:
        prepare(command, [word])
    assert str(raised.value).startswith(f"{word!r} is no argument; arguments are written as key=")
    assert str(raised.value).endswith(meant)


def test_a_command_of_another_program_is_named_with_its_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model_type", "qwen-vl-chat", "--custom_train_dataset_path", "a.jsonl"]
    with pytest.raises(DataError) as raised:
        prepare("train", ["sft", *options])
    assert str(raised.value) == (
        "'sft' is a command of other programs; here it is train: python -m qwenvl_lit.train; "
        "arguments are written as key=value, without dashes: --model_type qwen-vl-chat "
        "--custom_train_dataset_path a.jsonl is model=qwen_vl_chat data=jsonl "
        "data.train=a.jsonl here"
    )
    with pytest.raises(DataError, match=r"here it is train: python -m qwenvl_lit\.train --help"):
        prepare("test", ["sft"])


def test_an_adapter_is_a_start_and_not_a_run_to_resume(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    resume = ["--resume_from_checkpoint", str(tmp_path)]
    for options in (resume, [*resume, "--resume_only_model", "true"]):
        with pytest.raises(DataError, match=f" is ckpt={tmp_path} here"):
            prepare("train", options)
    for options in (["--resume_only_model", "true"], ["--resume_only_model"]):
        with pytest.raises(DataError, match=r" is ckpt=run here"):
            prepare("train", [*options, "--resume_from_checkpoint", "run"])
    with pytest.raises(DataError, match=r" is resume=run here"):
        prepare("train", ["--resume_from_checkpoint", "run", "--resume_only_model", "false"])


def test_an_upload_is_named_with_its_repository():
    push = ["--push_to_hub", "true"]
    repository = ["--hub_model_id", "a/b"]
    for options, meant in (
        (push, "push=OWNER/NAME"),
        ([*push, *repository], "push=a/b"),
        ([*repository, *push], "push=a/b"),
    ):
        with pytest.raises(DataError, match=f" is {meant} here; see"):
            prepare("export", options, run="needed")


def test_values_of_flags_are_no_files_of_settings():
    for arguments in (
        ["--config-dir", "mine", "experiment=sft"],
        ["--config-name=train", "seed=1"],
        ["--cfg", "job", "--resolve", "~callbacks.samples"],
        ["--deepspeed", "ds.yaml", "seed=1"],
    ):
        refuse_files("train", arguments)
