"""Answers from prompts: the one place where tokens are decoded, for chat, test and predict alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig

from qwenvl_lit.generation.sampling import Choice, Stops
from qwenvl_lit.models.host_copy import HostCopy
from qwenvl_lit.models.qwen_vl.decoder import decoder_of, release


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """How answers are decoded. The names are those of transformers; greedy unless `do_sample`.

    Each row is answered as it would be alone, whatever stands beside it in the batch.
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
    seed: int | None = None  # of each call; None: torch's own generator goes on
    compile: Literal["auto"] | bool = (
        "auto"  # auto: on a GPU, after a minute of answers, which is what it costs to make good
    )

    def __post_init__(self):
        if self.compile not in ("auto", True, False):
            raise ValueError(f"generation.compile is auto, true or false, got {self.compile!r}")
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"generation.max_new_tokens={self.max_new_tokens} must be at least 1, and generation.min_new_tokens={self.min_new_tokens} "
                f"between 0 and that"
            )

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        image_keys: Sequence[str] | None = None,
    ) -> list[list[int]]:
        """New ids of each row of a left-padded batch, in order, ending before the first stop id.

        Args:
            image_keys: of the batch's images, equal where images are; each is then encoded once, and remembered for a while.
        """
        decoder = decoder_of(model) if self.num_beams == 1 else None
        if decoder is None:
            new = self._by_transformers(model, inputs, stop_ids, pad_id)
        else:
            new = self._decode(decoder, inputs, stop_ids, image_keys)
        return [
            row[: next((place for place, token in enumerate(row) if token in stop_ids), len(row))]
            for row in new.tolist()
        ]

    @torch.inference_mode()
    def _decode(self, decoder, inputs, stop_ids, image_keys) -> torch.Tensor:
        logits = decoder.start(
            inputs, new_tokens=self.max_new_tokens, image_keys=image_keys, compile=self.compile
        )
        choice = self._choice(inputs, logits, stop_ids)
        stops = Stops(len(logits), stop_ids, logits.device)
        new = []
        while True:
            new.append(choice(logits))
            if len(new) == self.max_new_tokens or stops.all_seen(new[-1]):
                return torch.stack(new, dim=1)
            logits = decoder.step(new[-1])

    def _choice(self, inputs, logits, stop_ids) -> Choice:
        names = (
            "min_new_tokens",
            "do_sample",
            "temperature",
            "top_p",
            "top_k",
            "repetition_penalty",
            "seed",
        )
        return Choice(inputs, logits, stop_ids, **{name: getattr(self, name) for name in names})

    @torch.inference_mode()
    def _by_transformers(self, model, inputs, stop_ids, pad_id) -> torch.Tensor:
        """Beams; and networks that are spread over devices, sharded, or of another family."""
        # What is left out, transformers takes from the checkpoint's generation_config.json; these say "no sampling" without a warning.
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
        if self.do_sample:
            sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            do_sample=self.do_sample,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            repetition_penalty=self.repetition_penalty,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            **sampling,
        )
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return model.generate(**inputs, generation_config=settings)[
            :, inputs["input_ids"].shape[1] :
        ]

    def stream(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        image_keys: Sequence[str] | None = None,
    ) -> Iterator[list[int]]:
        """The new ids of one prompt, as `__call__` gives them, a few at a time (one, as a rule) while they are decoded.

        The caller may leave the iteration at any point; nothing runs on behind it. Another answer of the same network ends it.

        Raises:
            ValueError: several rows, or beams, of which nothing is known before the end; or another answer was begun meanwhile.
        """
        if len(inputs["input_ids"]) != 1 or self.num_beams > 1:
            raise ValueError(
                "an answer is streamed to one prompt at a time, without beams; set generation.num_beams=1"
            )
        decoder = decoder_of(model)
        if decoder is None:  # nothing is known of the answer before its end
            return iter(
                [ids] for ids in self(model, inputs, stop_ids=stop_ids, pad_id=pad_id) if ids
            )
        return self._stream(decoder, inputs, frozenset(stop_ids), image_keys)

    def _stream(self, decoder, inputs, stop_ids, image_keys) -> Iterator[list[int]]:
        with torch.inference_mode():
            logits = decoder.start(
                inputs, new_tokens=self.max_new_tokens, image_keys=image_keys, compile=self.compile
            )
            choice = self._choice(inputs, logits, stop_ids)
            new, answer = choice(logits), decoder.answer
        for place in range(self.max_new_tokens):
            with torch.inference_mode():
                read = HostCopy(new)
                if (
                    place + 1 < self.max_new_tokens
                ):  # the next one is on its way before this one is read
                    new = choice(decoder.step(new, answer))
            (id,) = read.read().tolist()
            if id in stop_ids:
                return
            yield [id]

    @staticmethod
    def release(model: nn.Module) -> None:
        """Forget what is kept from one answer to the next: cache, graphs, encoded images. For the room they take; and needed when weights
        have changed or adapters are switched or merged.
        """
        release(model)
