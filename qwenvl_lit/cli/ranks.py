"""Processes that torchrun or SLURM starts: all of them use one run folder, which only the first writes Hydra's files to."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence


def rank_arguments(verb: str, arguments: Sequence[str]) -> list[str]:
    """The command line of this process, with the folder of rank 0; as it is where Lightning starts the others, or there are none.

    Under torchrun the folder has rank 0's time, under SLURM the number of the job, so that a job that is queued again finds its folder.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    if not (torchrun or slurm) or {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    rank = os.environ["RANK" if torchrun else "SLURM_PROCID"]
    placed = list(arguments)
    if not any(argument.startswith("hydra.run.dir=") for argument in arguments):
        name = _time_of_first(rank == "0") if torchrun else f"slurm_{os.environ['SLURM_JOB_ID']}"
        placed.append(f"hydra.run.dir=outputs/{verb}/{name}")
    return (
        placed
        if rank == "0"
        else [*placed, "hydra.output_subdir=null", f"hydra.job.name={verb}_rank_{rank}"]
    )


def _time_of_first(first: bool) -> str:
    """Told to the others through the store that torchrun keeps for its processes."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"qwenvl_lit/start_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if first:
        store.set(key, time.strftime("%Y-%m-%d_%H-%M-%S"))
    return store.get(key).decode()
