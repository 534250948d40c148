"""Does a run fit on its cards? Told before anything is loaded, with what would fit if it does not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import hydra
import lightning
from hydra.utils import instantiate
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.models.protocols import Family
from qwenvl_lit.training.adapters.methods import Adapter
from qwenvl_lit.training.memory import (
    GIB,
    MemoryEstimate,
    Sharding,
    available_gpu_memory,
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
    """What decides how much memory a card needs."""

    adapter: Adapter
    rows: int  # of a batch, on each card
    recompute: bool  # all blocks, for their gradients
    compiled: bool  # perhaps
    spread: Sharding
    cards: int

    def estimate_memory(self, family: Family, row: Mapping[str, int]) -> MemoryEstimate:
        return estimate_memory(
            self.adapter.apply(family.meta_model(), family.components).train(),
            training_inputs(family, self.rows, **row),
            family.components,
            four_bits=self.adapter.quantization is not None,
            recomputed=None if self.recompute else 0,
            compiled=self.compiled,
            spread=self.spread,
            cards=self.cards,
        )


def check_memory(
    config: DictConfig, task: VisionLanguageModule, data: DataModule, trainer: lightning.Trainer
) -> None:
    """Print what a card needs; nothing for a run of less than a GiB.

    Raises:
        DataError: a GPU has less, and `memory.check` is on. Of the host's memory there is only a warning.
    """
    spread, cards = sharding_of(trainer)
    rows = (
        data.batch_size
        if data.max_tokens is None
        else max(1, data.max_tokens // config.memory.tokens)
    )
    row = {name: config.memory[name] for name in ("tokens", "images", "targets")}
    on_gpu = isinstance(trainer.accelerator, CUDAAccelerator)
    room = (
        available_gpu_memory()
        if on_gpu
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / trainer.num_devices
    )
    speed = {
        "recompute": task.speed.checkpointing == "full",
        "compiled": on_gpu and task.speed.compile is not False,
    }
    plan = TrainingSetup(adapter=task.adapter, rows=rows, **speed, spread=spread, cards=cards)
    found = plan.estimate_memory(task.family, row)
    if on_gpu and task.speed.checkpointing == "auto" and not fits(found, room):
        plan = replace(plan, recompute=True)
        found = plan.estimate_memory(task.family, row)
    if found.total < GIB:
        return
    console = Console(stderr=True)
    if rank_zero_only.rank == 0:  # the trainer does not know its rank yet
        console.print(memory_table(found, room, f"batches of {rows} x {row['tokens']} tokens"))
    if fits(found, room):
        return
    message = f"this run needs about {found.total / GIB:.1f} GiB on each card, which has {room / GIB:.1f} GiB"
    if not on_gpu or not config.memory.check:
        if rank_zero_only.rank == 0:
            console.print(f"warning: {message if on_gpu else message.replace('card', 'process')}")
        return
    raise DataError(
        f"{message}. {_advice(plan, task.family, row, room)}. To start it all the same: memory.check=false"
    )


def _advice(plan: TrainingSetup, family: Family, row: Mapping[str, int], room: float) -> str:
    """Less of the same if that is enough; else what one can do with more cards, and with another adapter."""
    small, arguments = replace(plan, recompute=True), "speed.checkpointing=auto"
    savings = [] if plan.recompute else [(arguments, small)]
    if plan.rows > 1:
        small, arguments = (
            replace(small, rows=1),
            f"{arguments} data.batch_size=1, with more trainer.accumulate_grad_batches",
        )
        savings.append((arguments, small))
    more_cards = [
        (
            f"strategy=fsdp trainer.devices={cards} {arguments}",
            replace(small, spread="sharded", cards=cards),
        )
        for cards in (2, 4, 8)
        if plan.spread != "sharded" or cards > plan.cards
    ]
    adapters = [
        (f"adapter={name} {arguments}", replace(small, adapter=_adapter(name)))
        for name in ("lora", "qlora")
    ]
    if enough := _first_that_fits(savings, family, row, room):
        return f"What fits: {enough}"
    found = [_first_that_fits(choices, family, row, room) for choices in (more_cards, adapters)]
    return (
        f"What fits: {' or '.join(filter(None, found))}"
        if any(found)
        else "Nothing here fits: it takes larger cards"
    )


def _first_that_fits(
    choices: Iterable[tuple[str, TrainingSetup]],
    family: Family,
    row: Mapping[str, int],
    room: float,
) -> str | None:
    for arguments, plan in choices:
        if fits(found := plan.estimate_memory(family, row), room):
            return f"{arguments} (about {found.total / GIB:.1f} GiB)"
    return None


def _adapter(name: str) -> Adapter:
    return instantiate(
        hydra.compose("train", overrides=[f"adapter={name}"]).adapter, _convert_="all"
    )
