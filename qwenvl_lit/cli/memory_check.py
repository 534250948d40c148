"""Checks that a run fits into GPU memory before anything is loaded, and suggests what would fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import hydra
import lightning
from hydra.utils import instantiate
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.models.protocols import Family
from qwenvl_lit.rendering.table import output_console
from qwenvl_lit.training.adapters.methods import Adapter
from qwenvl_lit.training.memory import (
    GIB,
    MemoryEstimate,
    Sharding,
    available_memory,
    estimate_memory,
    fits,
    memory_table,
    training_inputs,
)
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.strategies import sharding_of
from qwenvl_lit.types import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """What the memory per GPU depends on, besides the model and the length of a row."""

    adapter: Adapter
    rows: int  # per batch, on each GPU
    checkpointed: bool  # activation checkpointing of all blocks
    compiled: bool
    sharding: Sharding
    gpus: int

    def estimate(self, family: Family, row: Mapping[str, int]) -> MemoryEstimate:
        """Estimates the memory per GPU.

        Args:
            row: how many tokens, images and targets a row has, see `training_inputs`.
        """
        return estimate_memory(
            self.adapter.apply(family.meta_model(), family).train(),
            training_inputs(family, self.rows, **row),
            family.components,
            quantized=self.adapter.quantization is not None,
            checkpointed=None if self.checkpointed else 0,
            compiled=self.compiled,
            sharding=self.sharding,
            gpus=self.gpus,
        )


def check_memory(
    config: DictConfig, module: VisionLanguageModule, data: DataModule, trainer: lightning.Trainer
) -> None:
    """Prints the estimated memory per GPU, if it is 1 GiB or more.

    With `data.batch_size` "auto", it checks micro-batches of one row and prints nothing: `Speed`
    prints the memory of the micro-batches that it chooses.

    Raises:
        DataError: the estimate exceeds the memory of a GPU, and `memory.check` is on. If it is off,
            and on the CPU, a warning is printed instead.
    """
    row = {name: config.memory[name] for name in ("tokens", "images", "targets")}
    rows = data.batch_size
    if data.max_tokens is not None:
        rows = max(1, data.max_tokens // row["tokens"])
    on_gpu = isinstance(trainer.accelerator, CUDAAccelerator)
    device = "GPU" if on_gpu else "process"
    available = available_memory(on_gpu=on_gpu, processes=trainer.num_devices)
    sharding, gpus = sharding_of(trainer)
    setup = TrainingSetup(
        adapter=module.adapter,
        rows=rows,
        checkpointed=module.speed.checkpointing == "full",
        compiled=on_gpu and module.speed.compile is not False,
        sharding=sharding,
        gpus=gpus,
    )
    estimate = setup.estimate(module.family, row)
    if on_gpu and module.speed.checkpointing == "auto" and not fits(estimate, available):
        setup = replace(setup, checkpointed=True)
        estimate = setup.estimate(module.family, row)
    if estimate.total < GIB:
        return
    message = (
        f"this run needs about {estimate.total / GIB:.1f} GiB per {device}, "
        f"but {available / GIB:.1f} GiB are available"
    )
    refused = on_gpu and config.memory.check
    if rank_zero_only.rank == 0:  # the trainer does not know its rank yet
        console = output_console(stderr=True)
        batches = f"batches of {rows} x {row['tokens']} tokens"
        if not data.cuts_steps:
            console.print(memory_table(estimate, available, device=device, batches=batches))
        if not fits(estimate, available) and not refused:
            console.print(f"warning: {message}", soft_wrap=True)
    if refused and not fits(estimate, available):
        suggestion = _suggest(setup, module.family, row, available)
        raise DataError(f"{message}. {suggestion}. To start the run as it is: memory.check=false")


def _suggest(setup: TrainingSetup, family: Family, row: Mapping[str, int], available: float) -> str:
    """Suggests cheaper settings. If none fits, suggests more GPUs and another adapter."""
    cheapest, arguments = replace(setup, checkpointed=True), "speed.checkpointing=auto"
    cheaper = {}
    if not setup.checkpointed:
        cheaper[arguments] = cheapest
    if setup.rows > 1:
        cheapest = replace(cheapest, rows=1)
        arguments += " data.batch_size=1, with more trainer.accumulate_grad_batches"
        cheaper[arguments] = cheapest
    if cheaper_that_fits := _first_that_fits(cheaper, family, row, available):
        return f"This fits: {cheaper_that_fits}"
    more_gpus = {}
    for gpus in (2, 4, 8):
        if setup.sharding != "fsdp" or gpus > setup.gpus:
            changed = replace(cheapest, sharding="fsdp", gpus=gpus)
            more_gpus[f"strategy=fsdp trainer.devices={gpus} {arguments}"] = changed
    adapters = {}
    for name in ("lora", "qlora"):
        adapters[f"adapter={name} {arguments}"] = replace(cheapest, adapter=_adapter(name))
    suggestions = []
    for choices in (more_gpus, adapters):
        if suggestion := _first_that_fits(choices, family, row, available):
            suggestions.append(suggestion)
    if not suggestions:
        return "Neither strategy=fsdp on 8 GPUs nor adapter=qlora fits: use larger GPUs"
    return f"This fits: {' or '.join(suggestions)}"


def _first_that_fits(
    choices: Mapping[str, TrainingSetup],
    family: Family,
    row: Mapping[str, int],
    available: float,
) -> str | None:
    """Returns the arguments of the first setup that fits, and its estimate; None if none fits."""
    for arguments, setup in choices.items():
        estimate = setup.estimate(family, row)
        if fits(estimate, available):
            return f"{arguments} (about {estimate.total / GIB:.1f} GiB)"
    return None


def _adapter(name: str) -> Adapter:
    """Builds an adapter from its file in conf/adapter."""
    config = hydra.compose("train", overrides=[f"adapter={name}"])
    return instantiate(config.adapter, _convert_="all")
