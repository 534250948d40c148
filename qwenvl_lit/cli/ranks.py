"""Processes that torchrun or SLURM starts share one run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence


def rank_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """Adds the run folder of rank 0 to the arguments of each rank.

    Without torchrun or SLURM nothing is added: Lightning passes the folder on by itself. The folder
    is named after the start time of rank 0 under torchrun, and after the job under SLURM, so that
    a job that SLURM queues again finds its folder. Only rank 0 writes Hydra's files.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    under_slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    is_multirun = not {"-m", "--multirun"}.isdisjoint(arguments)
    if is_multirun or not (under_torchrun or under_slurm):
        return list(arguments)
    rank = os.environ["RANK" if under_torchrun else "SLURM_PROCID"]
    extended = list(arguments)
    if not any(argument.startswith("hydra.run.dir=") for argument in arguments):
        if under_torchrun:
            name = _start_time_of_rank_0(is_rank_0=rank == "0")
        else:
            name = f"slurm_{os.environ['SLURM_JOB_ID']}"
        extended.append(f"hydra.run.dir=outputs/{command}/{name}")
    if rank != "0":
        extended += ["hydra.output_subdir=null", f"hydra.job.name={command}_rank_{rank}"]
    return extended


def _start_time_of_rank_0(*, is_rank_0: bool) -> str:
    """The time at which rank 0 asked, shared through the store that torchrun keeps."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False)
    key = f"qwenvl_lit/start_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if is_rank_0:
        store.set(key, time.strftime("%Y-%m-%d_%H-%M-%S"))
    return store.get(key).decode()
