"""The next token of each row, and which rows have ended; computed without synchronizing."""

# n rows, T tokens of the prompts, V vocabulary, L ids of the longest stop word

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from qwenvl_lit.bounds import check_number
from qwenvl_lit.models.host_copy import HostCopy, upload
from qwenvl_lit.types import DataError

# Steps between two checks for ended rows on a GPU. At most twice as many steps are wasted, and no
# step synchronizes.
CHECK_EVERY = 2


# Takes the ids so far (n, T) and the scores of the next token (n, V), and returns other scores
ProcessLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the tokens of a row are chosen, with the names and meanings of transformers.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0

    def __post_init__(self):
        check_number("temperature", self.temperature, least=0)
        check_number("top_p", self.top_p, above=0, most=1)
        check_number("top_k", self.top_k, least=0, whole=True)
        check_number("repetition_penalty", self.repetition_penalty, above=0)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0


class NextToken:
    """Chooses ids (n,) from logits (n, V), greedily or by sampling, as transformers does.

    Each row has a `Sampling` of its own. A row is chosen as it would be alone.

    It has state: the tokens that each row has had, for the repetition penalty, and generators.

    Args:
        rows: the number of rows, all of them greedy until `begin`.
        generator: of rows without a seed of their own; None: torch's default generator.
    """

    def __init__(
        self,
        rows: int,
        vocabulary: int,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
    ):
        self.samplings = [Sampling()] * rows
        self.generator = generator
        self.generators: dict[int, torch.Generator] = {}  # of rows with a seed of their own
        self.device = device
        self.shape = (rows, vocabulary)
        self.min_new_tokens = self.chosen = 0  # see `of_batch`
        self.stop_ids = torch.empty(0, dtype=torch.int64, device=device)
        self.logits_processor: ProcessLogits | None = None  # see `of_batch`
        self.ids_nT = torch.empty(rows, 0, dtype=torch.int64, device=device)  # for it
        self.seen_nV: torch.Tensor | None = None  # (rows, V), once a row has a repetition penalty
        self._uploaded: dict[tuple, torch.Tensor] = {}

    def begin(
        self,
        row: int,
        sampling: Sampling,
        prompt_ids: torch.Tensor | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        """Sets how a row is chosen from now on.

        Args:
            prompt_ids: (T,), on the device. They count for the repetition penalty.
        """
        self.samplings[row] = sampling
        self._uploaded.clear()
        self.generators.pop(row, None)
        if seed is not None and sampling.draws:
            self.generators[row] = torch.Generator(self.device).manual_seed(seed)
        if sampling.repetition_penalty == 1:
            return
        if self.seen_nV is None:
            self.seen_nV = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        self.seen_nV[row] = False
        if prompt_ids is not None:
            self.seen_nV[row].index_fill_(0, prompt_ids, True)

    @classmethod
    def of_batch(
        cls,
        inputs: Mapping[str, Any],
        logits: torch.Tensor,
        stop_ids: Iterable[int],
        sampling: Sampling,
        *,
        min_new_tokens: int = 0,
        seed: int | None = None,
        logits_processor: ProcessLogits | None = None,
    ) -> NextToken:
        """Returns the choice for rows that begin together with the same settings.

        Args:
            inputs: left-padded prompts. Their padding does not count for the repetition penalty.
            logits: the first logits; only their shape and device are used.
            min_new_tokens: tokens of each row before which no stop id is chosen.
            seed: of the generator of all rows; None: torch's default generator.
            logits_processor: see `Generation`.
        """
        generator = None
        if seed is not None and sampling.draws:
            generator = torch.Generator(logits.device).manual_seed(seed)
        next_token = cls(*logits.shape, logits.device, generator=generator)
        next_token.samplings = [sampling] * len(logits)
        next_token.min_new_tokens = min_new_tokens
        next_token.stop_ids = upload(sorted(stop_ids), logits.device, torch.int64)
        if sampling.repetition_penalty != 1:
            next_token.seen_nV = _tokens_seen(inputs, logits)
        if logits_processor is not None:
            next_token.logits_processor = logits_processor
            next_token.ids_nT = inputs["input_ids"]
        return next_token

    def __call__(self, logits: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Returns the next id of each row.

        Args:
            rows: the rows that `logits` belong to; None: the first n.
        """
        rows = range(len(logits)) if rows is None else rows
        scores = self.scores(logits, rows)
        draws = [self.samplings[row].draws for row in rows]
        if not all(draws):
            ids = scores.argmax(-1)
        if any(draws):
            # The index of the largest p / e, with e from the exponential distribution, is a draw
            # from p. `multinomial` would synchronize.
            drawn = (scores.softmax(-1) / self._exponential(scores, rows)).argmax(-1)
            ids = drawn if all(draws) else torch.where(self._upload(draws), drawn, ids)
        if self._penalizes(rows):
            self.seen_nV.index_put_((self._upload(rows), ids), self._upload([True]))
        if self.logits_processor is not None:
            self.ids_nT = torch.cat((self.ids_nT, ids[:, None]), dim=1)
        self.chosen += 1
        return ids

    def scores(self, logits: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Returns the scores (n, V) to choose from, float32; the arguments are those of a call.

        They are the logits after repetition penalty, logits processor, temperature, top-k and
        top-p. -inf excludes a token.
        """
        rows = range(len(logits)) if rows is None else rows
        samplings = [self.samplings[row] for row in rows]
        scores = logits.float()
        if self._penalizes(rows):
            seen_nV = self.seen_nV.index_select(0, self._upload(rows))
            penalty = self._values([sampling.repetition_penalty for sampling in samplings])
            penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(seen_nV, penalized, scores)
        if self.chosen < self.min_new_tokens:
            scores = scores.index_fill(1, self.stop_ids, -torch.inf)
        if self.logits_processor is not None:
            # A copy: the processor may write to it, and keep it after the next step.
            scores = self.logits_processor(self.ids_nT, scores.clone())
            check_processed(scores, logits)
        temperatures = [sampling.temperature or 1.0 for sampling in samplings]
        if set(temperatures) != {1}:
            scores = scores / self._values(temperatures)
        top_k = [sampling.top_k * sampling.draws for sampling in samplings]
        if any(top_k):
            scores = scores.masked_fill(scores < self._kth_largest(scores, top_k), -torch.inf)
        rests = [(1 - sampling.top_p) * sampling.draws for sampling in samplings]
        if any(rests):
            rest = self._values(rests)
            sorted_scores, indices = scores.sort()
            is_rest = sorted_scores.softmax(-1).cumsum(-1) <= rest
            is_rest[:, -1] = False
            scores = scores.masked_fill(is_rest.scatter(1, indices, is_rest), -torch.inf)
        return scores

    def _kth_largest(self, scores: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
        """Returns the k-th largest score of each row (n, 1), -inf for k = 0."""
        limits = [min(k, scores.shape[1]) for k in top_k]
        largest = scores.topk(max(limits)).values
        if len(set(limits)) == 1:
            return largest[:, -1:]
        limits_n1 = self._upload(limits)[:, None]
        kth = largest.gather(1, (limits_n1 - 1).clamp(min=0))
        return kth.masked_fill(limits_n1 == 0, -torch.inf)

    def _exponential(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        noise = torch.empty_like(scores)
        if not all(row in self.generators for row in rows):
            noise.exponential_(generator=self.generator)
        for index, row in enumerate(rows):
            if row in self.generators:
                noise[index : index + 1].exponential_(generator=self.generators[row])
        return noise

    def _penalizes(self, rows: Sequence[int]) -> bool:
        return any(self.samplings[row].repetition_penalty != 1 for row in rows)

    def _values(self, values: Sequence[float]) -> float | torch.Tensor:
        """Returns values of rows as (n, 1), or as a number if they are equal."""
        return values[0] if len(set(values)) == 1 else self._upload(values)[:, None]

    def _upload(self, values: Sequence[float]) -> torch.Tensor:
        """Returns values of rows as (n,). They are the same in most steps, and are kept."""
        key = (type(values[0]), *values)
        if key not in self._uploaded:
            self._uploaded[key] = upload(values, self.device)
        return self._uploaded[key]


def _tokens_seen(inputs: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Returns which tokens the prompts contain, (n, V)."""
    ids_nT, mask_nT = inputs["input_ids"], inputs.get("attention_mask")
    if mask_nT is None:
        mask_nT = torch.ones_like(ids_nT)
    counts_nV = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    return counts_nV.scatter_add_(1, ids_nT, mask_nT.int()) > 0


def check_processed(scores: object, logits: torch.Tensor) -> None:
    """Raises a ValueError unless a logits processor has returned scores (n, V), none of them NaN.

    -inf excludes a token, as long as one is left.
    """
    if not isinstance(scores, torch.Tensor) or scores.shape != logits.shape:
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else repr(scores)
        raise ValueError(
            f"logits_processor must return scores of shape {tuple(logits.shape)}, got {found:.100}"
        )
    best = scores.max(-1).values
    if not best.isfinite().all():  # synchronizes
        raise ValueError(
            "logits_processor has returned NaN, infinity, or -inf for all tokens of a row"
        )


class FiniteLogits(LogitsProcessor):
    """Records whether all logits of an answer were finite. Adds to them without synchronizing.

    transformers' `generate` calls it as a logits processor, which changes nothing.
    """

    def __init__(self) -> None:
        self.sums_n: torch.Tensor | None = None  # NaN or infinite once a logit of the row was

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        sums_n = finite_sums(scores)
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


def finite_sums(logits: torch.Tensor) -> torch.Tensor:
    """Returns a number (n,) of each row of logits (n, V), which is finite only if the row is.

    -inf, which excludes a token, counts as finite.
    """
    return logits.masked_fill(logits == -torch.inf, 0).sum(-1, dtype=torch.float32)


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
