"""Does a run fit on its cards? Told before anything is loaded, with what would fit if it does not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import hydra
import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console

from qwenvl_lit.adapters import Adapter
from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.families.protocols import Family
from qwenvl_lit.memory import GIB, Need, Spread, need, need_table
from qwenvl_lit.strategies import FullyShard
from qwenvl_lit.task import Task
from qwenvl_lit.types import Conversation, DataError, Picture, Turn

SPARE = 1.04  # of what is estimated: memory in pieces too small to be used
CONTEXT = 0.5 * GIB  # what CUDA itself takes of a card


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What decides how much memory a card needs."""

    adapter: Adapter
    rows: int  # of a batch, on each card
    checkpointing: bool
    spread: Spread
    cards: int

    def need(self, family: Family, row: Mapping[str, int]) -> Need:
        return need(
            self.adapter.apply(family.outline(), family.parts).train(),
            training_inputs(family, self.rows, **row),
            family.parts,
            four_bits=self.adapter.quantization is not None,
            checkpointing=self.checkpointing,
            spread=self.spread,
            cards=self.cards,
        )


def check_memory(config: DictConfig, task: Task, data: DataModule, trainer: lightning.Trainer) -> None:
    """Print what a card needs; nothing for a run of less than a GiB.

    Raises:
        DataError: a GPU has less, and `memory.check` is on. Of the host's memory there is only a warning.
    """
    cards = trainer.num_devices * trainer.num_nodes
    spread: Spread = "sharded" if isinstance(trainer.strategy, FullyShard) else "replicated" if cards > 1 else "one"
    rows = data.batch_size if data.max_tokens is None else max(1, data.max_tokens // config.memory.tokens)
    plan = Plan(adapter=task.adapter, rows=rows, checkpointing=task.family.checkpointing, spread=spread, cards=cards)
    row = {name: config.memory[name] for name in ("tokens", "pictures", "targets")}
    found = plan.need(task.family, row)
    if found.total < GIB:
        return
    on_gpu = isinstance(trainer.accelerator, CUDAAccelerator)
    room = gpu_room() if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / trainer.num_devices
    console = Console(stderr=True)
    if rank_zero_only.rank == 0:  # the trainer does not know its rank yet
        console.print(need_table(found, room, f"batches of {rows} x {row['tokens']} tokens"))
    if fits(found, room):
        return
    message = f"this run needs about {found.total / GIB:.1f} GiB on each card, which has {room / GIB:.1f} GiB"
    if not on_gpu or not config.memory.check:
        if rank_zero_only.rank == 0:
            console.print(f"warning: {message if on_gpu else message.replace('card', 'process')}")
        return
    raise DataError(f"{message}. {_advice(plan, task.family, row, room)}. To start it all the same: memory.check=false")


def fits(found: Need, room: float) -> bool:
    return found.total * SPARE + CONTEXT <= room


def gpu_room() -> float:
    """Bytes of the smallest GPU that this process sees."""
    return min(torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count()))


def training_inputs(family: Family, rows: int, *, tokens: int, pictures: int, targets: int) -> dict[str, Any]:
    """Arguments of the network for `rows` equal rows, on the meta device: of about so many tokens, so many of them learned."""
    processor = family.processor()
    if most := processor.settings.get("max_length"):
        tokens = min(tokens, most)
    answer = "1" * max(1, targets - 1)  # a digit is a token in every vocabulary, and an end mark is learned too
    length = processor.length(_row(pictures, "", answer))[0]
    sample = processor.encode(_row(pictures, "1" * max(0, tokens - length), answer))
    inputs = family.inputs(Pad(pad_id=processor.pad_id)([sample] * rows))
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _row(pictures: int, question: str, answer: str) -> Conversation:
    parts = (*(Picture(Image.new("RGB", (8, 8))) for _ in range(pictures)), question)
    return Conversation(id="a row", turns=(Turn(role="user", parts=parts), Turn(role="assistant", parts=(answer,))))


def _advice(plan: Plan, family: Family, row: Mapping[str, int], room: float) -> str:
    """Less of the same if that is enough; else what one can do with more cards, and with another adapter."""
    small, arguments = replace(plan, checkpointing=True), "model.checkpointing=true"
    savings = [] if plan.checkpointing else [(arguments, small)]
    if plan.rows > 1:
        small, arguments = replace(small, rows=1), f"{arguments} data.batch_size=1, with more trainer.accumulate_grad_batches"
        savings.append((arguments, small))
    more_cards = [
        (f"strategy=fsdp trainer.devices={cards} {arguments}", replace(small, spread="sharded", cards=cards))
        for cards in (2, 4, 8)
        if plan.spread != "sharded" or cards > plan.cards
    ]
    adapters = [(f"adapter={name} {arguments}", replace(small, adapter=_adapter(name))) for name in ("lora", "qlora")]
    if enough := _first_that_fits(savings, family, row, room):
        return f"What fits: {enough}"
    found = [_first_that_fits(choices, family, row, room) for choices in (more_cards, adapters)]
    return f"What fits: {' or '.join(filter(None, found))}" if any(found) else "Nothing here fits: it takes larger cards"


def _first_that_fits(choices: Iterable[tuple[str, Plan]], family: Family, row: Mapping[str, int], room: float) -> str | None:
    for arguments, plan in choices:
        if fits(found := plan.need(family, row), room):
            return f"{arguments} (about {found.total / GIB:.1f} GiB)"
    return None


def _adapter(name: str) -> Adapter:
    return instantiate(hydra.compose("train", overrides=[f"adapter={name}"]).adapter, _convert_="all")
