"""`resume=`: the arguments that it becomes, and a run that is killed and resumed."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from commands import read_json_lines, start_command
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from small_demo import small_demo

from qwenvl_lit.cli.resume import nothing_left, refuse_used_folder, resume_arguments, resumed
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.types import DataError

STARTED_WITH = [
    "model=qwen_vl_chat",
    "optim.lr=1e-5",
    "data.train='a b.jsonl'",
    "resume='auto'",
]
RESUMED = [
    "resume=outputs/train/mine",
    "hydra.run.dir=outputs/train/mine",
    "hydra.output_subdir=null",
]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run with a checkpoint, started with the arguments `STARTED_WITH`."""
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/train/mine")
    for name in (".hydra", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text("seed: 1")
    overrides = "".join(f"- {argument}\n" for argument in STARTED_WITH)
    (folder / ".hydra/overrides.yaml").write_text(overrides)
    (folder / "checkpoints/last.ckpt").touch()
    return folder


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["resume=outputs/train/mine"], []),
        (["resume='outputs/train/mine'", "trainer.max_steps=9"], ["trainer.max_steps=9"]),
        (["resume=latest"], []),
        (["resume=outputs/train/mine/checkpoints/last.ckpt"], []),
        (["resume=auto", "hydra.run.dir='outputs/train/mine'", *STARTED_WITH[:3]], []),
        (
            ["resume=outputs/train/mine", STARTED_WITH[0], "trainer.max_epochs=3", "--cfg=job"],
            ["trainer.max_epochs=3", "--cfg=job"],
        ),
        # Lightning starts the second process of a resumed run with these arguments.
        (
            [*RESUMED, 'hydra.run.dir="outputs/train/mine"', "hydra.job.name=train_ddp_process_1"],
            ["hydra.job.name=train_ddp_process_1"],
        ),
    ],
)
def test_a_resumed_run_continues_in_its_folder_with_its_settings(run, arguments, kept):
    assert resume_arguments(arguments) == [*kept, *RESUMED]


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.lr=1"],
        ["resume=null"],
        ["resume=auto", "hydra.run.dir=new", "optim.lr=1"],
        ["resume=auto", "-m", "seed=1,2"],
    ],
)
def test_without_a_checkpoint_a_new_run_starts(run, arguments):
    assert resume_arguments(arguments) == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_a_run_that_cannot_be_resumed_is_named(run, arguments, message):
    with pytest.raises(DataError, match=message):
        resume_arguments(arguments)


def resumed_with(run: Path, monkeypatch, *arguments: str) -> tuple[int, int]:
    """`max_epochs` and `max_steps` of the run, which was started with 2000 steps."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [*arguments, f"resume={run}"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    config.paths.run = str(run)
    started = OmegaConf.merge(config, {"trainer": {"max_epochs": -1, "max_steps": 2000}})
    OmegaConf.save(started, run / ".hydra/config.yaml")
    trainer = resumed(config).trainer
    return trainer.max_epochs, trainer.max_steps


def test_a_changed_end_holds_for_the_next_resume(run, monkeypatch):
    assert resumed_with(run, monkeypatch) == (-1, 2000)
    (run / "config.yaml").write_text("trainer: {max_epochs: -1, max_steps: 120}")
    assert resumed_with(run, monkeypatch) == (-1, 120)
    assert resumed_with(run, monkeypatch, "trainer.max_steps=300") == (-1, 300)
    for damaged in ("trainer: {max_epochs: -1}", "trainer: {max_epochs: 1, max_steps: '${seed}'}"):
        (run / "config.yaml").write_text(damaged)
        with pytest.raises(DataError, match="max_epochs and max_steps, whole numbers or null"):
            resumed_with(run, monkeypatch)


def test_a_run_without_its_last_checkpoint_is_not_resumed(run):
    (run / "checkpoints/last.ckpt").rename(run / "checkpoints/best.ckpt")
    with pytest.raises(DataError, match=r"there is no checkpoints/last\.ckpt"):
        resume_arguments(["resume=outputs/train/mine"])


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("outputs/train/mine/checkpoints", "takes the folder of a run; the run is outputs/"),
        ("outputs/train/mine/checkpoints/best.ckpt", "folder of a run; the run is outputs/train/m"),
        ("outputs/train", "it holds the runs outputs/train/mine: give one of them"),
    ],
)
def test_a_folder_beside_a_run_gets_the_run_that_was_meant(run, resume, message):
    (run / "checkpoints/best.ckpt").touch()
    with pytest.raises(DataError, match=message):
        resume_arguments([f"resume={resume}"])


@pytest.mark.parametrize(
    "result",
    [
        "checkpoints/best.ckpt",
        "metrics.json",
        "predictions.rank0.jsonl",
        "refcoco/val/predictions.jsonl",
    ],
)
def test_a_folder_that_holds_results_is_refused(tmp_path, result):
    folder = tmp_path / "it's used"
    file = folder / result
    file.parent.mkdir(parents=True)
    for name in ("train.log", ".hydra"):
        (folder / name).touch()
    argument = f"hydra.run.dir='{tmp_path}/it\\'s used'"
    refuse_used_folder([argument])
    file.touch()
    advice = "choose another folder, or remove this one"
    if ".rank" in result:
        advice += f"; to answer the rows that are left: answered={folder} and another "
        advice += r"hydra\.run\.dir=, or none"
    with pytest.raises(DataError, match=rf"it's used holds an earlier run \({result}\): {advice}$"):
        refuse_used_folder([argument])


def test_a_test_that_has_not_ended_starts_again_in_its_folder(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/hydra.yaml").write_text("hydra: {job: {name: test}}")
    for name in ("metrics.json", "predictions.jsonl", "predictions.rank0.jsonl"):
        (tmp_path / name).touch()
    argument = f"hydra.run.dir={tmp_path}"
    refuse_used_folder([argument])
    (tmp_path / "report.html").touch()
    with pytest.raises(DataError, match=r"holds an earlier run \(metrics\.json\)"):
        refuse_used_folder([argument])


def test_the_folder_of_a_run_is_refused_with_how_to_resume_it(run):
    command = r"python -m qwenvl_lit\.train resume=outputs/train/mine$"
    with pytest.raises(DataError, match=f"to continue its training: {command}"):
        refuse_used_folder(["hydra.run.dir='outputs/train/mine'"])


def test_a_resumed_run_its_other_ranks_and_information_may_use_its_folder(run):
    folder = "hydra.run.dir='outputs/train/mine'"
    refuse_used_folder(resume_arguments(["resume=outputs/train/mine"]))
    refuse_used_folder([folder, "--cfg=job"])
    refuse_used_folder([folder, "hydra.output_subdir=null", "hydra.job.name=train_rank_1"])


TRAIN = [
    "trainer=smoke",
    "trainer.max_epochs=-1",
    "trainer.max_steps=40",
    "trainer.val_check_interval=16",
    "callbacks=[train,early_stopping]",
    "callbacks.checkpoint.every=5",
    "callbacks.run_log.print_every=1",
    *small_demo(train=48),
    "data.train=[train_single.jsonl#16,train.jsonl#48]",
    "data.batch_size=8",
    "data.num_workers=1",
    "data.generated_validation_rows=0",
    "adapter=lora",
]


def start_training(folder: Path, *arguments: str) -> subprocess.Popen:
    """Starts training as the first process of a new process group."""
    return start_command(folder, "train", *TRAIN, *arguments, own_group=True, PYTHONUNBUFFERED="1")


def send_signal_at(process: subprocess.Popen, step: str, number: signal.Signals) -> str:
    """Sends a signal to the process group when a line starts with `step`; returns the output.

    So do clusters: the data workers get the signal too.
    """
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(step):
            os.killpg(process.pid, number)
    return output


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_the_same_command_resumes_a_run_after_sigkill_and_after_sigterm(tmp_path):
    uninterrupted = start_training(tmp_path, "hydra.run.dir=uninterrupted")
    output, _ = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0, output

    resume = ["hydra.run.dir=resumed", "resume=auto"]
    for number, step, status in (
        (signal.SIGKILL, "step 7/40", -9),
        (signal.SIGTERM, "step 17/40", 143),
    ):
        process = start_training(tmp_path, *resume)
        output = send_signal_at(process, step, number)
        assert process.wait(timeout=120) == status, output
    last = start_training(tmp_path, *resume)
    output, _ = last.communicate(timeout=120)
    assert last.returncode == 0, output
    assert "Traceback" not in output
    assert "Nothing was left to train" not in output
    output, _ = start_training(tmp_path, *resume).communicate(timeout=120)
    nothing_left = "Nothing was left to train: the run has made its 40 steps. To train further: "
    assert f"{nothing_left}trainer.max_steps=..." in output

    expected = trained_weights(tmp_path / "uninterrupted")
    weights = trained_weights(tmp_path / "resumed")
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    log = read_json_lines(tmp_path / "resumed/logging.jsonl")
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 41))
    assert [row["step"] for row in log if "val/loss" in row] == [16, 32, 40]


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "expected"),
    [
        (3, -1, "3 steps. To train further: trainer.max_steps=..."),
        (-1, 1, "3 steps. To train further: trainer.max_epochs=..."),
        (
            *(5, 1),
            "3 steps, all of trainer.max_epochs=1, so trainer.max_steps=5 has no effect. "
            "To train further: trainer.max_epochs=...",
        ),
    ],
)
def test_a_complete_run_names_the_limit_that_ends_it(max_steps, max_epochs, expected):
    message = nothing_left(3, max_steps, max_epochs)
    assert message == f"Nothing was left to train: the run has made its {expected}"
