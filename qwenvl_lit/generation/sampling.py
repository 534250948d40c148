"""The next token of each row from its logits, and when all rows have ended; on the device, without waiting for it."""

# n rows, V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LOOK_EVERY = 2  # steps between two looks at what has ended; up to twice as many are made in vain, and none waits


class Choice:
    """Greedy or sampled ids (n,) from logits (n, V), as transformers chooses them; it remembers what each row has said.

    Args:
        inputs: of the prompt; its tokens, but not its padding, count for the repetition penalty.
        logits: any that the choice will be given, for their shape.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        logits: torch.Tensor,
        stop_ids: Iterable[int],
        *,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ):
        self.min_new_tokens = min_new_tokens
        self.do_sample = do_sample
        self.penalty = repetition_penalty
        self.chosen = 0
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=logits.device)
        self.seen: torch.Tensor | None = None  # (n, V)
        self.generator: torch.Generator | None = None
        self.warpers: list[Any] = []
        if repetition_penalty != 1:
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
            self.seen = (
                counts.scatter_add_(
                    1, ids, torch.ones_like(ids, dtype=torch.int32) if mask is None else mask.int()
                )
                > 0
            )
        if do_sample:
            if temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(float(temperature)))
            if top_k:
                self.warpers.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                self.warpers.append(TopPLogitsWarper(top_p))
            if seed is not None:
                self.generator = torch.Generator(logits.device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scores = self.scores(logits)
        if self.do_sample:
            # The largest of p / e, with e from the exponential distribution, is a draw from p; `multinomial` would wait for the device.
            scores = scores.softmax(-1)
            scores = scores / torch.empty_like(scores).exponential_(generator=self.generator)
        ids = scores.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        self.chosen += 1
        return ids

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that are chosen from, (n, V) float32: penalised, warped, -inf where a token must not come."""
        scores = logits.float()
        if self.seen is not None:
            scores = torch.where(
                self.seen,
                torch.where(scores < 0, scores * self.penalty, scores / self.penalty),
                scores,
            )
        if self.chosen < self.min_new_tokens:
            scores = scores.index_fill(1, self.stop_ids, -torch.inf)
        for warp in self.warpers:
            scores = warp(None, scores)
        return scores


class Stops:
    """Which of n rows have come to a stop id."""

    def __init__(self, rows: int, stop_ids: Iterable[int], device: torch.device):
        on_gpu = device.type == "cuda"
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.every = LOOK_EVERY if on_gpu else 1
        self.steps = 0
        self.told = torch.zeros(
            (), dtype=torch.bool, pin_memory=on_gpu
        )  # whether all had ended when it was last asked
        self.arrived = torch.cuda.Event() if on_gpu else None

    def all_seen(self, ids: torch.Tensor) -> bool:
        """Whether every row, with the latest ids (n,), is known to have ended. On a GPU this is `LOOK_EVERY` to twice as many steps old:
        while the host reads it, the device has steps left to make.
        """
        self.ended |= (ids[:, None] == self.stop_ids).any(1)
        self.steps += 1
        if self.steps % self.every:
            return False
        if self.arrived is None:
            return bool(self.ended.all())
        if self.steps > self.every:
            self.arrived.synchronize()
            if self.told:
                return True
        self.told.copy_(self.ended.all(), non_blocking=True)
        self.arrived.record()
        return False
