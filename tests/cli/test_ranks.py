"""Processes that torchrun, SLURM or Lightning starts share one run folder."""

import subprocess
import sys

import pytest
from commands import environment, only_run, read_json_lines
from small_demo import small_demo

from qwenvl_lit.cli.ranks import rank_arguments

TRAIN = [
    "trainer=smoke",
    *small_demo(train=8, single=8, validation=3),
    "data.train=train.jsonl#8",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.generated_validation_rows=3",
    "generation.max_new_tokens=4",
    "~callbacks.curves",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
KILLED_AFTER_2_MINUTES = ["timeout", "-s", "KILL", "120"]


@pytest.fixture
def slurm(monkeypatch):
    """Returns a function that makes this process a rank of a SLURM job with two tasks."""

    def become(rank: int) -> None:
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURM_NTASKS", "2")
        monkeypatch.setenv("SLURM_JOB_ID", "77")

    return become


def test_ranks_of_slurm_share_the_folder_of_their_job(slurm):
    folder = "hydra.run.dir=outputs/train/slurm_77"
    slurm(0)
    assert rank_arguments("train", ["seed=1"]) == ["seed=1", folder]
    slurm(1)
    of_rank_1 = ["hydra.output_subdir=null", "hydra.job.name=train_rank_1"]
    assert rank_arguments("train", ["seed=1"]) == ["seed=1", folder, *of_rank_1]
    mine = "hydra.run.dir='mine'"
    assert rank_arguments("train", [mine]) == [mine, *of_rank_1]


@pytest.mark.parametrize("arguments", [["seed=1"], ["-m", "seed=1,2"]])
def test_a_single_process_and_a_sweep_keep_their_folders(slurm, arguments):
    if "-m" in arguments:
        slurm(1)
    assert rank_arguments("train", arguments) == arguments


@pytest.mark.parametrize(
    ("launcher", "strategy", "log"),
    [
        (TORCHRUN, "fsdp_cpu", "train_rank_1.log"),
        ([], "ddp_cpu", "train_ddp_process_1.log"),
    ],
    ids=["torchrun", "Lightning"],
)
def test_two_ranks_write_one_run_folder(tmp_path, launcher, strategy, log):
    command = [*KILLED_AFTER_2_MINUTES, sys.executable, *launcher, "-m", "qwenvl_lit.train"]
    process = subprocess.run(
        [*command, f"strategy={strategy}", *TRAIN],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    run = only_run(tmp_path, "train")
    names = {path.name for path in run.iterdir()}
    assert {log, ".hydra", "checkpoints", "config.yaml", "metrics.json"} <= names
    assert f"strategy={strategy}" in (run / ".hydra/overrides.yaml").read_text()
    steps = [row["step"] for row in read_json_lines(run / "logging.jsonl") if "loss" in row]
    assert steps == [1, 2]  # 8 rows: each step takes 2 on each of 2 ranks
    assert process.stdout.count("Score it:") == 1
