"""Mistakes on the command line get one short message; free text reaches the program as typed."""

import subprocess
import sys
import time

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from qwenvl_lit.cli.command import quote_free_text


def run(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    verb, *rest = arguments
    return subprocess.run(
        [sys.executable, "-m", f"qwenvl_lit.{verb}", *rest], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "trainer.max_setps=3"], "did you mean trainer.max_steps"),
        (
            ["test", "model=qwen_vl_chat", "answered=mine"],
            "no key 'answered'; it is one of predict",
        ),
        (["train", "modle=qwen_vl_chat"], "did you mean model?"),
        (["train", "model=qwen_vl_cat"], "qwen_vl_chat"),
        (["train", "data=cocco"], "Available options in 'data': chartqa, coco_en, "),
        (["train", "model.template=chatlm"], "chatlm"),
        (["train", "x y z"], "x y z"),
        (["train", "-m", "hydra/launcher=slurm", "seed=1,2"], "pip install 'qwenvl_lit[cluster]'"),
        (["test"], "ckpt is missing"),
        (["predict"], "ckpt is missing"),
        (
            ["predict", "model=qwen_vl_tiny", "data=demo", "image=a.png", "prompt=Hi"],
            "image= with prompt= asks one question, and data=demo",
        ),
        (
            ["predict", "model=qwen_vl_tiny", "answered=mine", "prompt=Hi"],
            "prompt= asks one question, and answered='mine' is for the rows",
        ),
        (["test", "ckpt=nowhere"], "nowhere does not exist"),
        (["test", "ckpt=latest"], "train first"),
    ],
)
def test_a_mistake_gets_a_short_message_without_traceback(arguments, says, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 15


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "model=qwen_vl_tiny", "image=a.png"], "prompt is missing"),
        (
            ["export", "model=qwen_vl_tiny"],
            "out is missing: python -m qwenvl_lit.export ckpt=RUN out=FOLDER",
        ),
        (["train", "data.packing=true"], "say data.max_tokens=8192"),
        pytest.param(
            ["train", "strategy=ddp"],
            "there is no GPU: strategy=auto takes what there is; strategy=ddp_cpu",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
        ),
        (
            ["train", "speed.checkpointing=some"],
            "speed.checkpointing is auto, none, full, got 'some'",
        ),
    ],
)
def test_a_command_that_is_refused_leaves_no_run_folder(arguments, says, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "outputs").glob("*/*")) == []


def test_a_refused_command_leaves_what_is_not_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    run("predict", "model=qwen_vl_tiny", "image=a.png", "hydra.run.dir=mine", cwd=tmp_path)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    result = run("train", "hydra.run.dir=/dev/null/run", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: /dev/null/run cannot be written: Not a directory.")


def test_a_run_is_not_overwritten_by_any_verb(tmp_path):
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "mine/checkpoints/last.ckpt").write_text("weeks")
    for verb, *arguments in (["train"], ["predict", "model=qwen_vl_tiny"]):
        result = run(verb, *arguments, "hydra.run.dir=mine", cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith(
            "error: hydra.run.dir=mine holds an earlier run (checkpoints/last.ckpt)"
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "checkpoints", "last.ckpt"]


def test_a_reader_that_has_enough_ends_the_help_quietly(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "qwenvl_lit.train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_the_package_says_which_commands_there_are(tmp_path):
    command = [sys.executable, "-m", "qwenvl_lit"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith(
        "python -m qwenvl_lit.train    Fine-tune a model on a dataset.\n"
    )
    result = subprocess.run([*command, "train"], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (
        1,
        "error: there is no command 'train' here; write it behind a dot, as above\n",
    )


def test_help_begins_with_the_keys_of_the_verb_and_what_they_mean(tmp_path):
    for verb, key in (
        ("chat", "multiline: false  # true: a question"),
        ("export", "out: null  # the folder to write"),
    ):
        text = run(verb, "--help", cwd=tmp_path).stdout
        assert text.index(key) < text.index("Groups and their choices"), verb


@pytest.mark.parametrize("verb", ["train", "test", "predict"])
def test_help_lists_groups_and_choices_within_three_seconds(verb, tmp_path):
    start = time.perf_counter()
    result = run(verb, "--help", cwd=tmp_path)
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    assert "model: qwen_vl, qwen_vl_chat, qwen_vl_tiny" in result.stdout
    assert seconds < 3


@pytest.mark.parametrize(
    "text",
    [
        "What's in it?",
        "a, b (c) x=3",
        "这是什么？",
        "back\\slash",
        "ends in \\",
        "quote at end'",
        "\\'",
        "${paths.run}",
        'Find <ref>the "man"</ref>',
        "two\nlines",
        "  spaces  ",
        "outputs/epoch=1-step=3.ckpt",
        "null and void",
        "3 cats",
    ],
)
def test_free_text_comes_through_as_typed(text):
    quoted = quote_free_text(f"prompt={text}")
    [override] = OverridesParser.create().parse_overrides([quoted])
    from omegaconf import OmegaConf

    assert OmegaConf.create({"prompt": override.value()}).prompt == text
    assert (
        quote_free_text(quoted) == quoted
    )  # a second process of a run gets the quoted arguments again


def test_a_regular_expression_comes_through_as_typed():
    targets = r"transformer\.h\.[01]\.(attn\.c_attn|mlp\.w1)"
    [override] = OverridesParser.create().parse_overrides(
        [quote_free_text(f"adapter.targets={targets}")]
    )
    assert override.value() == targets


def test_lists_of_files_come_through_as_typed():
    quoted = quote_free_text("data.train=[one.jsonl#200, it's (two).jsonl,'a,b.jsonl']")
    [override] = OverridesParser.create().parse_overrides([quoted])
    assert override.value() == ["one.jsonl#200", "it's (two).jsonl", "a,b.jsonl"]
    assert quote_free_text(quoted) == quoted


def test_how_a_model_is_held_can_be_said_of_runs_that_do_not_say_it():
    quoted = quote_free_text("model.load_in_4bit=true")
    assert quoted == quote_free_text(quoted) == "++model.load_in_4bit=true"


def test_other_keys_are_left_to_hydra():
    for argument in (
        "optim.lr=1e-4,5e-5",
        "data.test={easy: a.jsonl}",
        "prompt=null",
        "data.validation=0.01",
        "--help",
        "~callbacks.samples",
    ):
        assert quote_free_text(argument) == argument
