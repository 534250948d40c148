"""Two processes: a run goes on bit by bit, waits for no device, is stopped as a whole, and tells a full disk on all ranks."""

import os
import resource
import signal
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy
from small_run import DROPOUT, At, Killed, kills_at, run, same

from qwenvl_lit.callbacks.throughput import Throughput
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import DataError

GLOO = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}  # not to wait for ever


def fault_of_barrier(*_, **__):
    raise AssertionError("a step of training has a barrier")


def run_rank(rank: int, folder: Path, port: int) -> None:
    """Leaves what it found in a file of its own."""
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)

    def fit(name: str, *callbacks, strategy=DDPStrategy, **options):
        return run(
            folder / name, *callbacks, devices=2, strategy=strategy(**GLOO), max_epochs=4, **options
        )

    for kind, options in (
        ("ddp", {"adapter": DROPOUT}),
        ("fsdp", {"adapter": Full(), "strategy": FSDP2Strategy}),
    ):
        fit(f"{kind}_whole", **options)
        with pytest.raises(Killed):
            fit(f"{kind}_killed", kills_at("on_train_batch_start", 10), **options)
        fit(f"{kind}_killed", resume=True, **options)

    barrier = torch.distributed.barrier  # has the host wait for its device
    forbid = At(
        "on_train_batch_start", 5, lambda: setattr(torch.distributed, "barrier", fault_of_barrier)
    )
    allow = At("on_train_batch_end", 8, lambda: setattr(torch.distributed, "barrier", barrier))
    for strategy, adapter in ((DDPStrategy, DROPOUT), (FSDP2Strategy, Full())):
        fit(
            f"waits_{strategy.__name__}",
            forbid,
            allow,
            Throughput(),
            strategy=strategy,
            adapter=adapter,
            every=1000,
            limit_val_batches=0,
        )

    told = At("on_train_batch_start", 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        fit("ddp_stopped", *[told] * rank, every=1000)  # only rank 1 hears of it
    fit("ddp_stopped", resume=True, every=1000)

    full = At(
        "on_train_batch_start",
        6,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
    )
    with pytest.raises(DataError) as fault:
        fit("disk", *[full] * (1 - rank), limit_val_batches=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / f"rank{rank}").write_text(f"{ended.value.code} {fault.value}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(folder, port), nprocs=2)
    return folder


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("whole", "other"),
    [("ddp_whole", "ddp_killed"), ("ddp_whole", "ddp_stopped"), ("fsdp_whole", "fsdp_killed")],
)
def test_a_run_of_two_processes_goes_on_as_one_that_was_not_stopped(runs, whole, other):
    one, two = last(runs / whole), last(runs / other)
    assert one["global_step"] == two["global_step"] == 8
    assert same(one["state_dict"], two["state_dict"])
    assert len(one["random"]) == 2


def test_a_sharded_run_leaves_a_file_of_whole_tensors(runs):
    weights = last(runs / "fsdp_whole")["state_dict"]
    assert tuple(weights["model.transformer.wte.weight"].shape)[1] == 32
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())


@pytest.mark.parametrize("strategy", ["DDPStrategy", "FSDP2Strategy"])
def test_no_step_has_a_barrier(runs, strategy):
    """One would have ended the run, in the steps of its second epoch."""
    assert last(runs / f"waits_{strategy}")["global_step"] == 8


def test_all_ranks_stop_together_and_only_the_first_says_with_what_status(runs):
    assert [(runs / f"rank{rank}").read_text().split()[0] for rank in (0, 1)] == ["143", "0"]


def test_a_full_disk_ends_all_ranks(runs):
    said = [(runs / f"rank{rank}").read_text().partition(" ")[2] for rank in (0, 1)]
    assert said[0] == said[1]
    assert "last.ckpt cannot be written" in said[0]
    assert last(runs / "disk")["global_step"] == 2
