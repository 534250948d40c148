"""Runs code of a test in two processes that train together."""

import faulthandler
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from warm import run_processes

# The timeout lets a test fail that would otherwise wait for a rank that has ended.
GLOO = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}


def on_two_ranks(work: Callable[[int, Path], None], folder: Path) -> None:
    """Calls `work(rank, folder)`, a function of a module, in a process for each rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_processes(_start, work, folder, port, count=2)


def _start(rank: int, work: Callable[[int, Path], None], folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    faulthandler.enable()  # says where a rank was that C code ends
    work(rank, folder)
