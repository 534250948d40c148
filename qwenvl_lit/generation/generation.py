"""Answers from prompts: the one place that decodes, for chat, test and predict."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from qwenvl_lit.bounds import check_number
from qwenvl_lit.generation.decoders import decoder_of, release
from qwenvl_lit.generation.sampling import (
    FiniteLogits,
    NextToken,
    ProcessLogits,
    Sampling,
    Stops,
    check_processed,
)
from qwenvl_lit.generation.streaming import stream_ids
from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.settings import check_settings

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Decoder

SAMPLING = {"temperature": (0, 1), "top_p": (1,), "top_k": (0,)}  # values without effect
IMAGE_NAMES = ("image", "images", "img", "imgs", "image_path", "pictures")  # no settings
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Settings for decoding, with the names of transformers; greedy unless `do_sample`.

    As in the APIs of OpenAI and vLLM, a temperature of 0 is greedy too.

    Each row is answered as it would be alone, regardless of the other rows of its batch.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams
    repetition_penalty: float = 1.0
    # Further ends of an answer: words as lists of token ids. The answer does not include them.
    stop_words_ids: Sequence[Sequence[int]] = ()
    seed: int | None = None  # of each call; None: torch's default generator
    # "auto": on a GPU, once a minute has been spent decoding. `training.answering` replaces it by
    # a decision before the first answer.
    compile: Literal["auto"] | bool = "auto"
    # Called for each new token with the ids so far (n, T), which begin with the padded prompts, and
    # its scores (n, V), float32, and returns the scores to choose from. A LogitsProcessor or a
    # LogitsProcessorList of transformers, or a function like it. As there, it comes after the
    # repetition penalty and before the temperature.
    logits_processor: ProcessLogits | None = None

    def __post_init__(self):
        check_settings("generation", {name: getattr(self, name) for name in self.__slots__})
        unused = []
        for name, neutral in SAMPLING.items():
            value = getattr(self, name)
            if not self.do_sample and value not in neutral:
                unused.append(f"{name}={value:g}")
        if unused:
            _warn_of_unused(", ".join(unused))
        most = self.max_new_tokens
        check_number("generation.min_new_tokens", self.min_new_tokens, most=most)

        if not (self.logits_processor is None or callable(self.logits_processor)):
            raise ValueError(
                f"generation.logits_processor is a function of ids and scores, or a "
                f"LogitsProcessorList, got {self.logits_processor!r:.200}"
            )
        for word in self.stop_words_ids:
            is_ids = isinstance(word, Sequence) and all(type(token_id) is int for token_id in word)
            if not is_ids or not word:
                raise ValueError(
                    f"generation.stop_words_ids is a list of words, each a list of token ids, got "
                    f"{word!r:.200} in it"
                )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.do_sample and self.temperature > 0

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        image_keys: Sequence[str] | None = None,
    ) -> list[list[int]]:
        """Returns the new ids of each row of a left-padded batch, up to the first stop id.

        Args:
            image_keys: keys of the batch's images, equal for equal images. Each of these is encoded
                once and cached for later batches.

        Raises:
            DataError: logits are not finite.
        """
        decoder = decoder_of(model) if self.num_beams == 1 else None
        if decoder is None:
            finite = FiniteLogits()
            new_ids = self._generate(model, inputs, stop_ids, pad_id, finite)
            finite.check(finite.copy())
        else:
            new_ids = self._decode(decoder, inputs, stop_ids, image_keys)
        return [self._up_to_stop(ids, stop_ids) for ids in new_ids.tolist()]

    def stream(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        image_keys: Sequence[str] | None = None,
    ) -> Iterator[list[int]]:
        """Yields the new ids of one prompt, the same as `__call__`, while they are decoded.

        Usually one id at a time. The caller may stop iterating at any point: decoding is at most
        one step ahead. Starting another answer of the same decoder ends this one.

        Raises:
            ValueError: there are several rows or beams, or another answer was started meanwhile.
            DataError: logits are not finite.
        """
        if len(inputs["input_ids"]) != 1 or self.num_beams > 1:
            raise ValueError(
                "an answer is streamed to one prompt at a time, without beams; "
                "set generation.num_beams=1"
            )
        decoder = decoder_of(model)
        if decoder is None:
            pieces = self._stream_generated(model, inputs, frozenset(stop_ids), pad_id)
        else:
            pieces = self._stream(decoder, inputs, frozenset(stop_ids), image_keys)
        return self._without_stop_words(pieces) if self.stop_words_ids else pieces

    @staticmethod
    def release(model: nn.Module) -> None:
        """Frees what is kept between answers: the cache, CUDA graphs and encoded images.

        Call it for their memory, and whenever weights have changed or adapters were switched or
        merged.
        """
        release(model)

    @torch.inference_mode()
    def _decode(
        self,
        decoder: Decoder,
        inputs: Mapping[str, Any],
        stop_ids: Collection[int],
        image_keys: Sequence[str] | None,
    ) -> torch.Tensor:
        logits = self._start(decoder, inputs, image_keys)
        next_token = self._next_token(inputs, logits, stop_ids)
        stops = Stops(len(logits), stop_ids, logits.device, self.stop_words_ids)
        finite = FiniteLogits()
        new_ids = []
        while True:
            finite(None, logits)
            new_ids.append(next_token(logits))
            if len(new_ids) == self.max_new_tokens or stops.all_ended(new_ids[-1]):
                finite.check(finite.copy())
                return torch.stack(new_ids, dim=1)
            logits = decoder.step(new_ids[-1])

    def _stream(
        self,
        decoder: Decoder,
        inputs: Mapping[str, Any],
        stop_ids: Collection[int],
        image_keys: Sequence[str] | None,
    ) -> Iterator[list[int]]:
        with torch.inference_mode():
            logits = self._start(decoder, inputs, image_keys)
            next_token = self._next_token(inputs, logits, stop_ids)
            new_ids, answer = next_token(logits), decoder.answer
            finite = FiniteLogits()
        for count in range(1, self.max_new_tokens + 1):
            with torch.inference_mode():
                finite(None, logits)
                copies = HostCopy(new_ids), finite.copy()
                if count < self.max_new_tokens:  # queue the next step before reading this one
                    logits = decoder.step(new_ids, answer)
                    new_ids = next_token(logits)
            token_id = copies[0].read().item()
            finite.check(copies[1])
            if token_id in stop_ids:
                return
            yield [token_id]

    def _stream_generated(
        self, model: nn.Module, inputs: Mapping[str, Any], stop_ids: Collection[int], pad_id: int
    ) -> Iterator[list[int]]:
        finite = FiniteLogits()
        generate = partial(self._generate, model, inputs, stop_ids, pad_id, finite)
        for ids in stream_ids(generate, check=lambda: finite.check(finite.copy())):
            if ids[0] in stop_ids:
                return
            yield ids

    def _without_stop_words(self, pieces: Iterator[list[int]]) -> Iterator[list[int]]:
        """Yields ids up to the first stop word; ids that may begin one are held back."""
        held: list[int] = []
        for piece in pieces:
            for token_id in piece:
                held.append(token_id)
                if word := self._word_at_end(held):
                    if rest := held[: -len(word)]:
                        yield rest
                    return
            free = len(held) - self._longest_beginning(held)
            if free:
                yield held[:free]
                held = held[free:]
        if held:
            yield held

    def _word_at_end(self, ids: Sequence[int]) -> Sequence[int]:
        """Returns the longest stop word with which `ids` end; empty if there is none."""
        words = [word for word in self.stop_words_ids if list(ids[-len(word) :]) == list(word)]
        return max(words, key=len, default=())

    def _longest_beginning(self, ids: Sequence[int]) -> int:
        """Returns how many of the last ids begin a stop word."""
        longest = max(map(len, self.stop_words_ids), default=0)
        for count in range(min(longest - 1, len(ids)), 0, -1):
            end = list(ids[-count:])
            if any(list(word[:count]) == end for word in self.stop_words_ids):
                return count
        return 0

    def _up_to_stop(self, ids: Sequence[int], stop_ids: Collection[int]) -> list[int]:
        """Returns `ids` up to the first stop id or stop word, without it."""
        kept: list[int] = []
        for token_id in ids:
            if token_id in stop_ids:
                return kept
            kept.append(token_id)
            if word := self._word_at_end(kept):
                return kept[: -len(word)]
        return kept

    def _start(
        self, decoder: Decoder, inputs: Mapping[str, Any], image_keys: Sequence[str] | None
    ) -> torch.Tensor:
        return decoder.start(
            inputs, new_tokens=self.max_new_tokens, image_keys=image_keys, compiled=self.compile
        )

    def _next_token(
        self, inputs: Mapping[str, Any], logits: torch.Tensor, stop_ids: Collection[int]
    ) -> NextToken:
        sampling = Sampling(repetition_penalty=self.repetition_penalty)
        if self.samples:
            sampling = replace(
                sampling, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k
            )
        return NextToken.of_batch(
            inputs,
            logits,
            stop_ids,
            sampling,
            min_new_tokens=self.min_new_tokens,
            seed=self.seed,
            logits_processor=self.logits_processor,
        )

    @torch.inference_mode()
    def _generate(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        stop_ids: Collection[int],
        pad_id: int,
        finite: FiniteLogits,
        **options: Any,
    ) -> torch.Tensor:
        """Decodes with transformers' `generate`, and returns the new ids of each row.

        For beams, and for networks that are spread over devices, sharded, or without a decoder.

        Args:
            finite: is shown the logits of each step.
            options: further arguments of `generate`.
        """
        # Transformers takes settings that are left out from the checkpoint's
        # generation_config.json. These values mean "no sampling" without a warning.
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
        if self.samples:
            sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            do_sample=self.samples,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            repetition_penalty=self.repetition_penalty,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            **sampling,
        )
        if self.seed is not None:
            torch.manual_seed(self.seed)
        options["logits_processor"] = LogitsProcessorList([finite])
        if self.logits_processor is not None:
            options["logits_processor"].append(self._checked_processor)
        ids = model.generate(**inputs, generation_config=settings, **options)
        return ids[:, inputs["input_ids"].shape[1] :]

    def _checked_processor(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert self.logits_processor is not None
        scores = self.logits_processor(ids, logits.clone())
        check_processed(scores, logits)
        return scores


@cache  # each call makes its settings anew
def _warn_of_unused(settings: str) -> None:
    log.warning(
        "%s has no effect: decoding is greedy unless do_sample=true (generation=sample)", settings
    )


def with_settings(
    generation: Generation, settings: Mapping[str, Any], *arguments: str
) -> Generation:
    """Returns `generation` with other `settings`.

    Args:
        arguments: names that the caller takes itself, for the hint at a misspelled one.

    Raises:
        TypeError: there is no such setting.
    """
    known = [field.name for field in fields(generation)]
    for name in settings:
        if name in IMAGE_NAMES:
            raise TypeError(
                f"there is no setting {name!r}: an image is a part of the question, "
                f"chat([Path('dog.jpg'), 'What is this?'])"
            )
        if name not in known:
            nearest = get_close_matches(name, [*known, *arguments], n=1)
            names = ", ".join([*arguments, *known])
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {names}"
            raise TypeError(f"there is no setting {name!r}; {hint}")
    return replace(generation, **settings)
