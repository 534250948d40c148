"""What `bench_train.py` measures, and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NONE, FULL = "speed.checkpointing=none", "speed.checkpointing=full"
CACHED = "speed.vision_cache=true"
MEASURED = ("speed=compiled", NONE)
EIGHT_BITS = ("speed=fp8", NONE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A run of training at full size.

    Args:
        arguments: of `python -m qwenvl_lit.train`, beside those of all cases and those that follow here.
        steps: optimizer steps that are measured, once the run is warm.
        seconds: about how long all of it takes on an H100, to know whether there is time for it.
        targets: the least that figures of the result should be.
        needs: what this cannot be measured without.
    """

    what: str
    arguments: tuple[str, ...] = ()
    batch: int = 16
    accumulate: int = 1
    max_tokens: int | None = None  # in place of `batch`
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    rows: Literal["even", "mixed"] = "even"
    steps: int = 60
    seconds: int = 65
    targets: Mapping[str, float] = field(default_factory=dict)
    needs: Literal["nothing", "gpu"] = "nothing"

    @property
    def cards(self) -> int:
        return 1 if self.strategy == "auto" else 2


def rate(samples_per_second: float) -> dict[str, float]:
    return {"samples_per_second": samples_per_second}


SWIFT = {"batch": 1, "accumulate": 16}  # the settings of ms-swift
ONE_CARD = {  # in the order of what is asked
    "bf16_16": Case(
        what="bf16", arguments=MEASURED, targets={**rate(42), "share_of_matmul": 0.67}, seconds=80
    ),
    "fp8_16": Case(what="FP8", arguments=EIGHT_BITS, targets=rate(56), needs="gpu", seconds=75),
    "fp8_32": Case(
        what="FP8", arguments=EIGHT_BITS, batch=32, targets=rate(56), needs="gpu", seconds=90
    ),
    "cached_bf16_16": Case(
        what="bf16, vision cached", arguments=(*MEASURED, CACHED), targets=rate(64)
    ),
    "cached_fp8_16": Case(
        what="FP8, vision cached", arguments=(*EIGHT_BITS, CACHED), targets=rate(88), needs="gpu"
    ),
    "cached_fp8_32": Case(
        what="FP8, vision cached",
        arguments=(*EIGHT_BITS, CACHED),
        batch=32,
        targets=rate(88),
        needs="gpu",
        seconds=80,
    ),
    "checkpointed_1": Case(
        what="bf16, checkpointing",
        arguments=("speed=compiled", FULL),
        batch=1,
        targets=rate(8),
        seconds=60,
    ),
    "mixed_8192": Case(
        what="bf16, mixed lengths, packed",
        arguments=(*MEASURED, "data.packing=true"),
        max_tokens=8192,
        rows="mixed",
        targets={"real_share": 0.95, "share_of_matmul": 0.6},
        seconds=110,
    ),
    "cached_bf16_32": Case(
        what="bf16, vision cached",
        arguments=(*MEASURED, CACHED),
        batch=32,
        targets=rate(64),
        seconds=80,
    ),
    "bf16_32": Case(what="bf16", arguments=MEASURED, batch=32, targets=rate(42), seconds=110),
    "bf16_8": Case(what="bf16", arguments=MEASURED, batch=8, targets=rate(42)),
    "eager_8": Case(
        what="bf16, nothing compiled", arguments=("speed=eager", NONE), batch=8, seconds=60
    ),
    "mixed_4096": Case(
        what="bf16, mixed lengths, packed",
        arguments=(*MEASURED, "data.packing=true"),
        max_tokens=4096,
        rows="mixed",
        targets={"real_share": 0.95, "share_of_matmul": 0.6},
    ),
}
TWO_CARDS = {
    "pair_1": Case(
        what="bf16, the twin of pair_2 on one card of its machine", arguments=MEASURED, seconds=110
    ),
    "pair_2": Case(
        what="bf16, DDP",
        arguments=MEASURED,
        strategy="ddp",
        targets={"times_one_card": 1.9},
        seconds=120,
    ),
    "full_2": Case(
        what="FSDP, everything trains",
        arguments=("adapter=full", "speed=compiled", "speed.checkpointing=auto"),
        accumulate=4,
        strategy="fsdp",
        steps=18,  # of 4 batches
        targets={"mfu": 0.4},
        seconds=240,
    ),
}
KEPT = {  # lighter settings, as people with less memory choose them
    "lora": Case(
        what="LoRA on c_attn, checkpointing", arguments=(FULL,), **SWIFT, steps=12, seconds=95
    ),
    "qlora": Case(
        what="QLoRA (4 bit), checkpointing",
        arguments=("adapter=qlora", FULL),
        **SWIFT,
        steps=6,
        seconds=80,
        needs="gpu",
    ),
    "lora_all": Case(
        what="LoRA on every linear layer, checkpointing",
        arguments=("adapter=lora_all", FULL),
        **SWIFT,
        steps=6,
        seconds=105,
    ),
    "ddp": Case(
        what="the twin of ddp_2 on one card, checkpointing",
        arguments=(FULL,),
        batch=8,
        accumulate=2,
        steps=18,
    ),
    "ddp_2": Case(
        what="DDP, checkpointing",
        arguments=(FULL,),
        batch=8,
        accumulate=2,
        strategy="ddp",
        steps=18,
        seconds=85,
    ),
    "fsdp_2": Case(
        what="FSDP, everything trains, checkpointing",
        arguments=("adapter=full", FULL),
        batch=1,
        accumulate=8,
        strategy="fsdp",
        steps=12,
        seconds=155,
    ),
}
GROUPS = {"one_card": ONE_CARD, "two_cards": TWO_CARDS, "kept": KEPT}
CASES = {**ONE_CARD, **TWO_CARDS, **KEPT}
TWINS = {"pair_2": "pair_1", "ddp_2": "ddp"}
BASELINES = {  # samples a second on an H100, of the same rows
    "the original by its default (batch 1, checkpointing)": 3.2,
    "the original at its best (batch 8)": 14.3,
}
TFLOP_OF_A_SAMPLE = {
    "vision included": 12.5,
    "vision cached": 8.4,
}  # of 320 tokens and an image, LoRA; models/flops.py counts them
