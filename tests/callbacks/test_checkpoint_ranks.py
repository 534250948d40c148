"""Two processes resume bit-exactly, do not synchronize, stop together and report a full disk."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from small_run import DROPOUT, At, Killed, kills_at, run, same
from two_ranks import GLOO, on_two_ranks

from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import DataError

DDP = {"strategy": DDPStrategy, "adapter": DROPOUT}
FSDP = {"strategy": FSDP2Strategy, "adapter": Full()}


def fit(folder: Path, *callbacks, strategy=DDPStrategy, **options) -> None:
    made = strategy(**GLOO)
    run(folder, *callbacks, devices=2, strategy=made, max_epochs=4, **options)


def resume_after_a_kill(folder: Path, name: str, **options) -> None:
    fit(folder / f"{name}_whole", **options)
    with pytest.raises(Killed):
        fit(folder / f"{name}_killed", kills_at("on_train_batch_start", 10), **options)
    fit(folder / f"{name}_killed", resume=True, **options)


def train_without_barriers(folder: Path, **options) -> None:
    """A barrier, which would synchronize with the device, ends the run in its second epoch."""
    barrier = torch.distributed.barrier

    def refuse(*_, **__):
        raise AssertionError("a training step has a barrier")

    def forbid():
        torch.distributed.barrier = refuse

    def allow():
        torch.distributed.barrier = barrier

    callbacks = (
        At("on_train_batch_start", 5, forbid),
        At("on_train_batch_end", 8, allow),
        Throughput(),
    )
    fit(folder, *callbacks, every=1000, limit_val_batches=0, **options)


def exit_status_after_a_signal(folder: Path, rank: int) -> int:
    """Only rank 1 receives the signal."""
    signalled = At("on_train_batch_start", 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    callbacks = [signalled] if rank == 1 else []
    with pytest.raises(SystemExit) as ended:
        fit(folder, *callbacks, every=1000)
    fit(folder, resume=True, every=1000)
    return ended.value.code


def error_of_a_full_disk(folder: Path, rank: int) -> str:
    """Only rank 0, which writes, cannot write large files."""

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    full = At("on_train_batch_start", 6, lambda: limit(20_000))
    callbacks = [full] if rank == 0 else []
    with pytest.raises(DataError) as error:
        fit(folder, *callbacks, limit_val_batches=0)
    limit(resource.RLIM_INFINITY)
    return str(error.value)


def run_rank(rank: int, folder: Path) -> None:
    """Writes the exit status and the error of this rank to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resume_after_a_kill(folder, "ddp", **DDP)
    resume_after_a_kill(folder, "fsdp", **FSDP)
    train_without_barriers(folder / "no_barrier_ddp", **DDP)
    train_without_barriers(folder / "no_barrier_fsdp", **FSDP)
    status = exit_status_after_a_signal(folder / "ddp_stopped", rank)
    error = error_of_a_full_disk(folder / "disk", rank)
    (folder / f"rank{rank}").write_text(f"{status} {error}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(run_rank, folder)
    return folder


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("whole", "other"),
    [("ddp_whole", "ddp_killed"), ("ddp_whole", "ddp_stopped"), ("fsdp_whole", "fsdp_killed")],
)
def test_a_resumed_run_of_two_processes_ends_as_an_uninterrupted_one(runs, whole, other):
    expected, resumed = last(runs / whole), last(runs / other)
    assert expected["global_step"] == resumed["global_step"] == 8
    assert same(expected["state_dict"], resumed["state_dict"])
    assert len(expected["random"]) == 2


def test_a_sharded_run_writes_whole_tensors(runs):
    weights = last(runs / "fsdp_whole")["state_dict"]
    assert tuple(weights["model.transformer.wte.weight"].shape)[1] == 32
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_step_has_a_barrier(runs, strategy):
    assert last(runs / f"no_barrier_{strategy}")["global_step"] == 8


def test_all_ranks_stop_together_and_only_the_first_has_the_exit_status(runs):
    assert [(runs / f"rank{rank}").read_text().split()[0] for rank in (0, 1)] == ["143", "0"]


def test_a_full_disk_ends_all_ranks(runs):
    errors = [(runs / f"rank{rank}").read_text().partition(" ")[2] for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "last.ckpt cannot be written" in errors[0]
    assert last(runs / "disk")["global_step"] == 2
