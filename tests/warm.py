"""Processes that start at once: a process that has imported the package forks them."""

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "lightning",
        "transformers",
        "peft",
        "qwenvl_lit.api",
        "qwenvl_lit.build",
        "qwenvl_lit.cli.command",
        "qwenvl_lit.training.adapters.peft_files",
    ]
)


def run_processes(work: Callable[..., None], *arguments: object, count: int = 1) -> None:
    """Calls `work(index, *arguments)` in `count` processes; raises if one of them fails."""
    torch.multiprocessing.start_processes(
        work, args=arguments, nprocs=count, start_method=context.get_start_method()
    )
