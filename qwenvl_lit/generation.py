"""Answers from prompts: the one place where tokens are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """How answers are decoded. The names are those of transformers; greedy unless `do_sample`."""

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

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel, inputs: Mapping[str, Any], *, stop_ids: Sequence[int], pad_id: int) -> list[list[int]]:
        """New ids of each row of a left-padded batch, in order, ending before the first stop id."""
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
        prompt_length = inputs["input_ids"].shape[1]
        # each rank decodes alone; transformers would have those with weights that were sharded once wait for each other
        rows = model.generate(**inputs, generation_config=settings, synced_gpus=False)[:, prompt_length:].tolist()
        return [row[: next((place for place, token in enumerate(row) if token in stop_ids), len(row))] for row in rows]

    def stream(self, model: PreTrainedModel, inputs: Mapping[str, Any], *, stop_ids: Sequence[int], pad_id: int) -> Iterator[list[int]]:
        """The new ids of one prompt, as `__call__` gives them, a few at a time (one, as a rule) while they are decoded.

        The caller may leave the iteration at any point; nothing runs on behind it.

        Raises:
            ValueError: several rows, or beams, of which nothing is known before the end.
        """
        if len(inputs["input_ids"]) != 1 or self.num_beams > 1:
            raise ValueError("an answer is streamed to one prompt at a time, without beams; set generation.num_beams=1")
        return ([id] for id in self(model, inputs, stop_ids=stop_ids, pad_id=pad_id)[0])
