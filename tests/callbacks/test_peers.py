"""Ranks notice that another rank was lost, has failed, or was stopped by a signal."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import warm
from lightning.pytorch.strategies import DDPStrategy
from small_run import At, run
from toy_task import ToyData, ToyTask, conversation, trainer

from qwenvl_lit.callbacks.peers import Peers
from qwenvl_lit.callbacks.predictions import PredictionWriter
from qwenvl_lit.cli.signals import stops_reported


def killed(rank: int, folder: Path, victim: int) -> None:
    act = At("on_train_batch_start", 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(folder, [act] if rank == victim else [])


def failing(rank: int, folder: Path, victim: int) -> None:
    def fail():
        raise KeyError("of this rank alone")

    train(folder, [At("on_train_batch_start", 6, fail)] if rank == victim else [])


def train(folder: Path, callbacks: list) -> None:
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    run(folder, Peers(), *callbacks, max_epochs=20, **options)


def predicting(rank: int, folder: Path, victim: int) -> None:
    """Only one rank receives SIGTERM; the other has many slow batches to answer."""

    class Slow(ToyTask):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            time.sleep(0.1)
            return super().predict_step(batch, batch_idx, dataloader_idx)

    stop = At("on_predict_batch_start", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    callbacks = [Peers(), PredictionWriter(), *([stop] if rank == victim else [])]
    data = ToyData(test={"rows": [conversation(index, says="yes") for index in range(500)]})
    strategy = DDPStrategy(process_group_backend="gloo")
    made = trainer(folder, *callbacks, strategy=strategy, devices=2)
    made.predict(Slow(), data, return_predictions=False)


def start(rank: int, work, folder: Path, victim: int, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    with (folder / f"output{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    with stops_reported("train"):
        work(rank, folder, victim)


def run_ranks(work, folder: Path, victim: int) -> tuple[list[int], list[str]]:
    """The exit statuses of both ranks and what they print to standard error."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        rank_process = warm.context.Process(target=start, args=(rank, work, folder, victim, port))
        rank_process.start()
        ranks.append(rank_process)
    for rank_process in ranks:
        rank_process.join(120)
        assert rank_process.exitcode is not None
    output = [(folder / f"output{rank}").read_text() for rank in range(2)]
    return [rank_process.exitcode for rank_process in ranks], output


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_the_line_that_says_how_to_resume(tmp_path, victim):
    statuses, output = run_ranks(killed, tmp_path, victim)
    survivor = 1 - victim
    assert (statuses[victim], statuses[survivor]) == (-signal.SIGKILL, 1)
    [line] = [line for line in output[survivor].splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: rank {victim} was lost (killed? out of memory?); the other ranks were stopped. "
        f"Saved after step 2. Resume:  python -m qwenvl_lit.train resume={tmp_path}"
    )
    assert "Traceback" not in output[survivor]


def test_a_rank_that_fails_alone_ends_the_other(tmp_path):
    statuses, output = run_ranks(failing, tmp_path, 1)
    assert statuses == [1, 1]
    assert "of this rank alone" in output[1]
    assert "error: rank 1 failed, see above; the other ranks were stopped. Saved after" in output[0]
    assert "Traceback" not in output[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_stops_all_of_them(tmp_path, victim):
    statuses, output = run_ranks(predicting, tmp_path, victim)
    assert statuses == [143, 0]
    advice = (
        f"The same command with answered={tmp_path}, and another hydra.run.dir= if it has one, "
    )
    assert f"Stopped by SIGTERM. {advice}" in output[0]
    assert "Stopped" not in output[1]
    assert "Traceback" not in output[0] + output[1]
