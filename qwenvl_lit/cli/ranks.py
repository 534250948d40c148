"""Processes that torchrun or SLURM starts share one run folder."""

from __future__ import annotations

import os
from collections.abc import Sequence


def rank_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of this rank, with those that make it share the run folder of rank 0.

    Without torchrun or SLURM, and in a sweep, nothing is added: Lightning passes the folder on.
    Under SLURM the folder is named after the job, so that a job that SLURM queues again finds its
    folder. Under torchrun rank 0 makes the folder and tells the other ranks, see `share_folder`.
    Only rank 0 writes Hydra's files.
    """
    under_torchrun = is_under_torchrun()
    under_slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    is_multirun = not {"-m", "--multirun"}.isdisjoint(arguments)
    if is_multirun or not (under_torchrun or under_slurm):
        return list(arguments)
    rank = os.environ["RANK" if under_torchrun else "SLURM_PROCID"]
    extended = list(arguments)
    is_named = any(argument.startswith("hydra.run.dir=") for argument in arguments)
    if under_slurm and not (under_torchrun or is_named):
        name = f"slurm_{os.environ['SLURM_JOB_ID']}"
        extended.append(f"hydra.run.dir=outputs/{command}/{name}")
    if rank != "0":
        extended += ["hydra.output_subdir=null", f"hydra.job.name={command}_rank_{rank}"]
    return extended


def is_under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def share_folder(folder: str) -> str:
    """Returns the `folder` of rank 0 on every rank, through the store that torchrun keeps.

    On the other ranks the call waits until rank 0 has made it.
    """
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False)
    key = f"qwenvl_lit/folder_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if os.environ["RANK"] == "0":
        store.set(key, folder)
    return store.get(key).decode()
