"""What `resume=` makes of a command line, and a run that is killed and goes on as a person would let it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenvl_lit.cli.resume import refuse_used_folder, resume_arguments
from qwenvl_lit.types import DataError

STARTED = ["model=qwen_vl_chat", "optim.lr=1e-5", "data.train='a b.jsonl'", "resume='auto'"]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run that has saved a checkpoint."""
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/train/mine")
    for name, text in (
        (".hydra/config.yaml", "seed: 1"),
        (".hydra/overrides.yaml", "".join(f"- {one}\n" for one in STARTED)),
        ("checkpoints/last.ckpt", ""),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


PLACED = [
    "resume=outputs/train/mine",
    "hydra.run.dir=outputs/train/mine",
    "hydra.output_subdir=null",
]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["resume=outputs/train/mine"], []),
        (["resume='outputs/train/mine'", "trainer.max_steps=9"], ["trainer.max_steps=9"]),
        (["resume=latest"], []),
        (["resume=auto", "hydra.run.dir='outputs/train/mine'", *STARTED[:3]], []),
        (
            ["resume=outputs/train/mine", *STARTED[:1], "trainer.max_epochs=3", "--cfg=job"],
            ["trainer.max_epochs=3", "--cfg=job"],
        ),
        # as Lightning starts a second process of a run that goes on
        (
            [*PLACED, 'hydra.run.dir="outputs/train/mine"', "hydra.job.name=train_ddp_process_1"],
            ["hydra.job.name=train_ddp_process_1"],
        ),
    ],
)
def test_a_run_goes_on_in_its_folder_with_its_settings(run, arguments, given):
    assert resume_arguments(arguments) == [*given, *PLACED]


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.lr=1"],
        ["resume=null"],
        ["resume=auto", "hydra.run.dir=new", "optim.lr=1"],
        ["resume=auto", "-m", "seed=1,2"],
    ],
)
def test_without_a_checkpoint_a_run_begins(run, arguments):
    assert resume_arguments(arguments) == arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["resume=outputs/train/mine", "optim.lr=2"],
            r"optim\.lr=2 contradicts the run.*only trainer\.max_epochs, .*ckpt=outputs",
        ),
        (
            ["resume=auto", "hydra.run.dir=outputs/train/mine", "model=qwen_vl"],
            "model=qwen_vl contradicts",
        ),
        (
            ["resume=outputs/train/mine", "hydra.run.dir=elsewhere"],
            r"leave out hydra\.run\.dir=elsewhere",
        ),
        (["resume=auto"], r"resume=auto needs the folder of the run.*hydra\.run\.dir="),
        (["resume=nowhere"], r"resume=nowhere: there is no checkpoints/last\.ckpt"),
    ],
)
def test_what_cannot_go_on_is_named(run, arguments, says):
    with pytest.raises(DataError, match=says):
        resume_arguments(arguments)


def test_a_run_without_its_last_checkpoint_is_named(run):
    (run / "checkpoints/last.ckpt").rename(run / "checkpoints/best.ckpt")
    with pytest.raises(DataError, match=r"there is no checkpoints/last\.ckpt"):
        resume_arguments(["resume=outputs/train/mine"])


@pytest.mark.parametrize(
    "result",
    [
        "checkpoints/best.ckpt",
        "metrics.json",
        "predictions.rank0.jsonl",
        "refcoco/val/predictions.jsonl",
    ],
)
def test_a_folder_that_holds_results_is_not_written_again(tmp_path, result):
    file = tmp_path / "it's used" / result
    file.parent.mkdir(parents=True)
    for name in ("train.log", ".hydra"):
        (tmp_path / "it's used" / name).touch()
    argument = f"hydra.run.dir='{tmp_path}/it\\'s used'"
    refuse_used_folder([argument])
    file.touch()
    with pytest.raises(
        DataError,
        match=rf"it's used holds an earlier run \({result}\): choose another folder, or remove this one$",
    ):
        refuse_used_folder([argument])


def test_a_run_says_how_it_goes_on_and_goes_on(run):
    with pytest.raises(
        DataError,
        match=r"to continue its training: python -m qwenvl_lit\.train resume=outputs/train/mine$",
    ):
        refuse_used_folder(["hydra.run.dir='outputs/train/mine'"])
    refuse_used_folder(resume_arguments(["resume=outputs/train/mine"]))
    refuse_used_folder(["hydra.run.dir='outputs/train/mine'", "--cfg=job"])
    refuse_used_folder(
        [
            "hydra.run.dir='outputs/train/mine'",
            "hydra.output_subdir=null",
            "hydra.job.name=train_rank_1",
        ]
    )


SMALL = [
    "trainer=smoke",
    "trainer.max_epochs=-1",
    "trainer.max_steps=40",
    "trainer.val_check_interval=16",
]
SMALL += ["callbacks.checkpoint.every=5", "callbacks.run_log.print_every=1", "data.num_workers=1"]
SMALL += [
    "+data.prepare.train=48",
    "+data.prepare.single=16",
    "+data.prepare.validation=4",
    "+data.prepare.test=4",
]
SMALL += [
    "+data.prepare.unseen_pairs=2",
    "+data.prepare.new_classes=8",
    "data.batch_size=8",
    "data.generated_validation_rows=0",
]
SMALL += [
    "data.train=[train_single.jsonl#16,train.jsonl#48]",
    "adapter=lora",
    "callbacks=[train,early_stopping]",
]


def train(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "QWENVL_LIT_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "qwenvl_lit.train", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def trained(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_the_same_command_goes_on_after_sigkill_and_after_sigterm(tmp_path):
    """As a cluster does it: the signal goes to all processes of the run, loaders included."""
    out, _ = (whole := train(tmp_path, *SMALL, "hydra.run.dir=whole")).communicate(timeout=120)
    assert whole.returncode == 0, out
    command = [*SMALL, "hydra.run.dir=killed", "resume=auto"]
    for number, at, status in (
        (signal.SIGKILL, "step 7/40", -9),
        (signal.SIGTERM, "step 17/40", 143),
        (None, None, 0),
    ):
        process = train(tmp_path, *command)
        said = ""
        for line in process.stdout:
            said += line
            if number and line.startswith(at):
                os.killpg(process.pid, number)
        assert process.wait(timeout=120) == status, said
    assert "Traceback" not in said
    assert "Nothing was left to train" not in said
    finished, _ = train(tmp_path, *command).communicate(timeout=120)
    assert (
        "Nothing was left to train: the run has made its 40 steps; To train further: trainer.max_steps=..."
        in finished
    )
    one, two = trained(tmp_path / "whole"), trained(tmp_path / "killed")
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [
        json.loads(line) for line in (tmp_path / "killed/logging.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "val/loss" in line] == [16, 32]
