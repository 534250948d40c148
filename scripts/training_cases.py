"""The cases that `bench_train.py` measures, with their targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NONE, FULL = "speed.checkpointing=none", "speed.checkpointing=full"
CACHED = "speed.vision_cache=true"
BF16 = ("speed=compiled", NONE)
FP8 = ("speed=fp8", NONE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A training run at full size.

    Args:
        arguments: of `python -m qwenvl_lit.train`, in addition to those of all cases and those that
            follow from the other fields.
        batch: rows per batch and GPU. None: the default, steps of 16 rows that are cut into
            micro-batches.
        steps: measured optimizer steps, after the warm-up.
        seconds: approximate duration of the whole run on an H100.
        targets: lower bounds for figures of the result.
        needs: what is required to measure it.
    """

    what: str
    arguments: tuple[str, ...] = ()
    batch: int | None = 16
    accumulate: int = 1
    max_tokens: int | None = None  # instead of `batch`
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    model: str = "qwen_vl_chat"  # of conf/model
    rows: Literal["even", "mixed"] = "even"
    steps: int = 60
    seconds: int = 65
    targets: Mapping[str, float] = field(default_factory=dict)
    needs: Literal["nothing", "gpu"] = "nothing"

    @property
    def gpus(self) -> int:
        return 1 if self.strategy == "auto" else 2


def rate(samples_per_second: float) -> dict[str, float]:
    return {"samples_per_second": samples_per_second}


SWIFT = {"batch": 1, "accumulate": 16}  # the settings of ms-swift
# Enough steps for speed.compile=auto to compile
DEFAULT = {"batch": None, "steps": 138, "seconds": 110}
SUCCESSOR = {"batch": None, "seconds": 130}
PACKED = ("speed=compiled", "data.packing=true")
OTHER_MODELS = {
    "qwen3_vl_8b": Case(
        what="Qwen3-VL-8B, LoRA, packed",
        model="qwen3_vl_8b",
        arguments=PACKED,
        max_tokens=8192,
        targets={"tflop_per_second": 420},
        **SUCCESSOR,
    ),
    "qwen2_5_vl_7b": Case(
        what="Qwen2.5-VL-7B, LoRA, packed",
        model="qwen2_5_vl_7b",
        arguments=PACKED,
        max_tokens=8192,
        targets={"tflop_per_second": 420},
        **SUCCESSOR,
    ),
    "qwen3_vl_2b_full": Case(
        what="Qwen3-VL-2B, full fine-tuning",
        model="qwen3_vl_2b",
        arguments=("adapter=full", "speed=compiled"),
        **SUCCESSOR,
    ),
}
ONE_GPU = {  # in order of importance
    "default": Case(what="the default command", targets=rate(42), **DEFAULT),
    "default_mixed": Case(
        what="the default command, mixed lengths",
        rows="mixed",
        targets={"share_of_matmul": 0.6},
        **{**DEFAULT, "seconds": 220},
    ),
    "lora_all": Case(
        what="LoRA on every linear layer",
        arguments=("adapter=lora_all",),
        targets=rate(26),
        **{**DEFAULT, "seconds": 150},
    ),
    "lora_all_fp8": Case(
        what="LoRA on every linear layer, FP8",
        arguments=("adapter=lora_all", "speed=fp8"),
        targets=rate(32),
        needs="gpu",
        batch=None,
        seconds=120,
    ),
    "qlora": Case(
        what="QLoRA (4-bit)",
        arguments=("adapter=qlora",),
        targets=rate(24),
        needs="gpu",
        **DEFAULT,
    ),
    "qlora_1": Case(
        what="QLoRA (4-bit)",
        arguments=("adapter=qlora", "speed=eager"),
        batch=1,
        accumulate=16,
        steps=6,
        needs="gpu",
    ),
    "bf16_16": Case(
        what="bf16", arguments=BF16, targets={**rate(42), "share_of_matmul": 0.67}, seconds=80
    ),
    "fp8_16": Case(what="FP8", arguments=FP8, targets=rate(56), needs="gpu", seconds=75),
    "fp8_32": Case(what="FP8", arguments=FP8, batch=32, targets=rate(56), needs="gpu", seconds=90),
    "cached_bf16_16": Case(what="bf16, vision cached", arguments=(*BF16, CACHED), targets=rate(64)),
    "cached_fp8_16": Case(
        what="FP8, vision cached", arguments=(*FP8, CACHED), targets=rate(88), needs="gpu"
    ),
    "cached_fp8_32": Case(
        what="FP8, vision cached",
        arguments=(*FP8, CACHED),
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
        arguments=(*BF16, "data.packing=true"),
        max_tokens=8192,
        rows="mixed",
        targets={"real_share": 0.95, "share_of_matmul": 0.6},
        seconds=110,
    ),
    "cached_bf16_32": Case(
        what="bf16, vision cached",
        arguments=(*BF16, CACHED),
        batch=32,
        targets=rate(64),
        seconds=80,
    ),
    "bf16_32": Case(what="bf16", arguments=BF16, batch=32, targets=rate(42), seconds=110),
    "bf16_8": Case(what="bf16", arguments=BF16, batch=8, targets=rate(42)),
    "eager_8": Case(
        what="bf16, not compiled", arguments=("speed=eager", NONE), batch=8, seconds=60
    ),
    "mixed_4096": Case(
        what="bf16, mixed lengths, packed",
        arguments=(*BF16, "data.packing=true"),
        max_tokens=4096,
        rows="mixed",
        targets={"real_share": 0.95, "share_of_matmul": 0.6},
    ),
}
TWO_GPUS = {
    "pair_1": Case(
        what="bf16, the twin of pair_2, on one GPU of the same machine", arguments=BF16, seconds=110
    ),
    "pair_2": Case(
        what="bf16, DDP",
        arguments=BF16,
        strategy="ddp",
        targets={"times_one_card": 1.9},
        seconds=120,
    ),
    "full_2": Case(
        what="FSDP, full fine-tuning",
        arguments=("adapter=full", "speed=compiled", "speed.checkpointing=auto"),
        accumulate=4,
        strategy="fsdp",
        steps=18,  # of 4 batches
        targets={"mfu": 0.4},
        seconds=240,
    ),
}
LOW_MEMORY = {  # settings for GPUs with less memory
    "lora": Case(
        what="LoRA on c_attn, checkpointing", arguments=(FULL,), **SWIFT, steps=12, seconds=95
    ),
    "ddp": Case(
        what="the twin of ddp_2 on one GPU, checkpointing",
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
        what="FSDP, full fine-tuning, checkpointing",
        arguments=("adapter=full", FULL),
        batch=1,
        accumulate=8,
        strategy="fsdp",
        steps=12,
        seconds=155,
    ),
}
GROUPS = {
    "one_gpu": ONE_GPU,
    "other_models": OTHER_MODELS,
    "two_gpus": TWO_GPUS,
    "low_memory": LOW_MEMORY,
}
CASES = {name: case for group in GROUPS.values() for name, case in group.items()}
TWINS = {"pair_2": "pair_1", "ddp_2": "ddp"}  # on two GPUs, and on one
BASELINES = {  # samples per second on an H100, with the same rows
    "original code, default settings (batch 1, checkpointing)": 3.2,
    "original code, fastest settings (batch 8)": 14.3,
}
# For 320 tokens and an image, with LoRA; models/qwen_vl/flops.py counts them
TFLOP_PER_SAMPLE = {"vision included": 12.5, "vision cached": 8.4}
