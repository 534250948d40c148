"""The next token of each row, and which rows have ended; computed without synchronizing."""

# n rows, T tokens of the prompts, V vocabulary, L ids of the longest stop word

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.types import DataError

# Steps between two checks for ended rows on a GPU. At most twice as many steps are wasted, and no
# step synchronizes.
CHECK_EVERY = 2


class NextToken:
    """Chooses ids (n,) from logits (n, V), greedily or by sampling, as transformers does.

    It has state: the tokens that each row has had, for the repetition penalty, and their number.

    Args:
        inputs: the prompts. Their tokens, but not their padding, count for the repetition penalty.
        logits: the first logits; only their shape and device are used.
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
        self.repetition_penalty = repetition_penalty
        self.chosen = 0  # tokens of each row so far
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=logits.device)
        self.seen_nV: torch.Tensor | None = None
        self.generator: torch.Generator | None = None
        self.warpers: list[Any] = []
        if repetition_penalty != 1:
            self.seen_nV = _tokens_seen(inputs, logits)
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
            # The index of the largest p / e, with e from the exponential distribution, is a draw
            # from p. `multinomial` would synchronize.
            scores = scores.softmax(-1)
            scores = scores / torch.empty_like(scores).exponential_(generator=self.generator)
        ids = scores.argmax(-1)
        if self.seen_nV is not None:
            self.seen_nV.scatter_(1, ids[:, None], True)
        self.chosen += 1
        return ids

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the scores (n, V) to choose from, float32.

        They are the logits after the repetition penalty and the warpers; -inf excludes a token.
        """
        scores = logits.float()
        if self.seen_nV is not None:
            penalty = self.repetition_penalty
            penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self.seen_nV, penalized, scores)
        if self.chosen < self.min_new_tokens:
            scores = scores.index_fill(1, self.stop_ids, -torch.inf)
        for warp in self.warpers:
            scores = warp(None, scores)
        return scores


def _tokens_seen(inputs: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Returns which tokens the prompts contain, (n, V)."""
    ids_nT, mask_nT = inputs["input_ids"], inputs.get("attention_mask")
    if mask_nT is None:
        mask_nT = torch.ones_like(ids_nT)
    counts_nV = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    return counts_nV.scatter_add_(1, ids_nT, mask_nT.int()) > 0


class FiniteLogits(LogitsProcessor):
    """Records whether all logits of an answer were finite. Adds to them without synchronizing.

    transformers' `generate` calls it as a logits processor, which changes nothing.
    """

    def __init__(self) -> None:
        self.sums_n: torch.Tensor | None = None  # NaN or infinite once a logit of the row was

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        # -inf excludes a token.
        sums_n = scores.masked_fill(scores == -torch.inf, 0).sum(-1, dtype=torch.float32)
        self.sums_n = sums_n if self.sums_n is None else self.sums_n + sums_n
        return scores

    def copy(self) -> HostCopy:
        """Returns the argument of `check` for the logits so far."""
        assert self.sums_n is not None
        return HostCopy(self.sums_n)

    @staticmethod
    def check(copy: HostCopy) -> None:
        """Raises a DataError if logits of a row were not finite."""
        require_finite(copy.read(), "logits")


def require_finite(values_n: torch.Tensor, name: str) -> None:
    """Raises a DataError if a value, one for each row of a batch, is not finite."""
    finite = values_n.isfinite()
    if finite.all():
        return
    raise DataError(
        f"the {name} of {int((~finite).sum())} of {len(values_n)} prompts are not finite (NaN or "
        f"infinite), so that their answers would be arbitrary: the weights are damaged, or "
        f"activations overflow; with model.dtype=float16 try bfloat16 or float32"
    )


class Stops:
    """Records which of n rows have produced a stop id, or all ids of a stop word in order."""

    def __init__(
        self,
        rows: int,
        stop_ids: Iterable[int],
        device: torch.device,
        words: Iterable[Sequence[int]] = (),
    ):
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.words = [torch.tensor(word, dtype=torch.int64, device=device) for word in words]
        longest = max(map(len, self.words), default=0)
        self.latest_nL = torch.full((rows, longest), -1, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.steps = 0
        self.last_check: HostCopy | None = None

    def all_ended(self, ids: torch.Tensor) -> bool:
        """Adds the latest ids (n,), and returns whether every row is known to have ended.

        On a GPU the answer is `CHECK_EVERY` to twice as many steps old, so that the device has work
        queued while the host reads it.
        """
        self.ended |= (ids[:, None] == self.stop_ids).any(1)
        if self.words:
            self.latest_nL = torch.cat((self.latest_nL[:, 1:], ids[:, None]), dim=1)
        for word in self.words:
            self.ended |= (self.latest_nL[:, -len(word) :] == word).all(1)
        self.steps += 1
        if not self.ended.is_cuda:
            return bool(self.ended.all())
        if self.steps % CHECK_EVERY:
            return False
        if self.last_check is not None and self.last_check.read():
            return True
        self.last_check = HostCopy(self.ended.all())
        return False
