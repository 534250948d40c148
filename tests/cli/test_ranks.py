"""Processes that others start use one run folder."""

import json
import os
import subprocess
import sys

import pytest

from qwenvl_lit.cli.ranks import rank_arguments

SMALL = [
    "+data.prepare.train=8",
    "+data.prepare.single=8",
    "+data.prepare.validation=3",
    "+data.prepare.test=4",
]
SMALL += [
    "+data.prepare.unseen_pairs=2",
    "+data.prepare.new_classes=8",
    "data.batch_size=2",
    "data.num_workers=0",
]
SMALL += [
    "data.train=train.jsonl#8",
    "data.generated_validation_rows=3",
    "generation.max_new_tokens=4",
    "~callbacks.curves",
]
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "qwenvl_lit.train",
]


@pytest.fixture
def slurm(monkeypatch):
    def rank(number: int) -> None:
        for name, value in {"SLURM_PROCID": number, "SLURM_NTASKS": 2, "SLURM_JOB_ID": 77}.items():
            monkeypatch.setenv(name, str(value))

    return rank


def test_processes_of_slurm_share_the_folder_of_their_job(slurm):
    slurm(0)
    assert rank_arguments("train", ["seed=1"]) == ["seed=1", "hydra.run.dir=outputs/train/slurm_77"]
    slurm(1)
    hydra = ["hydra.output_subdir=null", "hydra.job.name=train_rank_1"]
    assert rank_arguments("train", ["seed=1"]) == [
        "seed=1",
        "hydra.run.dir=outputs/train/slurm_77",
        *hydra,
    ]
    assert rank_arguments("train", ["hydra.run.dir='mine'"]) == ["hydra.run.dir='mine'", *hydra]


@pytest.mark.parametrize("arguments", [["seed=1"], ["-m", "seed=1,2"]])
def test_a_process_alone_and_a_sweep_keep_their_folders(monkeypatch, slurm, arguments):
    if "-m" in arguments:
        slurm(1)
    assert rank_arguments("train", arguments) == arguments


@pytest.mark.parametrize(
    ("launcher", "strategy", "log"),
    [
        (TORCHRUN, "fsdp_cpu", "train_rank_1.log"),
        (["-m", "qwenvl_lit.train"], "ddp_cpu", "train_ddp_process_1.log"),
    ],
    ids=["torchrun", "by Lightning"],
)
def test_two_ranks_leave_one_run_folder(tmp_path, launcher, strategy, log):
    environment = {
        **os.environ,
        "QWENVL_LIT_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        "timeout",
        "-s",
        "KILL",
        "120",
        sys.executable,
        *launcher,
        f"strategy={strategy}",
        "trainer=smoke",
        *SMALL,
    ]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    [run] = (tmp_path / "outputs/train").iterdir()
    assert {log, ".hydra", "checkpoints", "config.yaml", "metrics.json"} <= {
        path.name for path in run.iterdir()
    }
    assert f"strategy={strategy}" in (run / ".hydra/overrides.yaml").read_text()
    steps = [json.loads(line) for line in (run / "logging.jsonl").open()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2]  # 8 rows, 2 x 2 a step
    assert result.stdout.count("Score it:") == 1
