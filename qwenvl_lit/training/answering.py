"""How the LightningModule evaluates batches: their sizes, compilation and lack of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.data.micro_batches import CutRows
from qwenvl_lit.generation.choices import choose
from qwenvl_lit.terminal import printable
from qwenvl_lit.training.halving import Halving
from qwenvl_lit.training.rows_together import batch_lines, choose_rows, compilation_saves
from qwenvl_lit.types import Batch, micro_batches_of

if TYPE_CHECKING:
    import lightning

    from qwenvl_lit.data.evaluation_batches import BatchChoice, EvaluationPlan, RowSizes
    from qwenvl_lit.types import Prediction


class Answering:
    """Evaluates batches of prompts, and of rows whose loss is computed.

    Args:
        module: the `VisionLanguageModule`, whose trainer knows the rows to come.
    """

    def __init__(self, module: lightning.LightningModule):
        self.module = module
        self.halving = Halving(self.free_memory)
        # Whether the decoder is compiled if the config leaves it open
        self.compiled: Literal["auto"] | bool = "auto"

    def __call__(self, batches: Batch | Sequence[Batch]) -> list[Prediction]:
        """Answers each row of batches of prompts, which `CutRows` has made."""
        cut_again = partial(self._cut_again, prompt=True)
        answered = self.halving(self._answer, micro_batches_of(batches), cut_again)
        return list(chain.from_iterable(answered))

    def score(self, work: Callable[[Batch], object], batches: Batch | Sequence[Batch]) -> None:
        """Calls `work` for batches of rows whose loss is computed."""
        self.halving(work, micro_batches_of(batches), partial(self._cut_again, prompt=False))

    def free_memory(self) -> None:
        """Frees what is kept between answers."""
        self.module.generation.release(self.module.model)

    def choose_batches(self, sizes: RowSizes) -> BatchChoice:
        """Chooses how many rows of a set are evaluated together."""
        module = self.module
        self.free_memory()
        return choose_rows(
            sizes,
            model=module.model,
            family=module.family,
            generation=module.generation,
            trainer=module.trainer,
        )

    def begin(self) -> None:
        """Decides whether the decoder is compiled, from the rows that are to be answered.

        In a test or prediction, prints the batches and the decision.
        """
        trainer, generation = self.module.trainer, self.module.generation
        self.free_memory()  # images may have been encoded with other weights
        plans: Mapping[str, EvaluationPlan] = getattr(trainer.datamodule, "plans", {})
        if not plans:
            return
        saved = compilation_saves(plans, generation)
        # Under autocast there are no CUDA graphs, which would replay the casts of all weights
        casts = not str(trainer.precision).endswith("true")
        on_gpu = trainer.strategy.root_device.type == "cuda"
        self.compiled = on_gpu and not casts and saved > 0
        if trainer.is_global_zero and (trainer.testing or trainer.predicting):
            for line in batch_lines(plans):
                print(printable(line))
            if self.compiled and generation.compile == "auto":
                print(f"Decoding is compiled, which saves about {saved:.0f} s of this run")

    def _cut_again(self, batch: Batch, *, prompt: bool) -> list[Batch]:
        processor = self.module.processor
        pad = Pad(
            pad_id=processor.pad_id,
            collate_vision=processor.collate_vision,
            side="left" if prompt else "right",
        )
        cut = CutRows(pad=pad, limit=self.halving.limit, options_apart=prompt)
        samples = [processor.encode(row, prompt=prompt) for row in batch.conversations]
        return [part.to(self.module.device) for part in cut(samples)]

    def _answer(self, batch: Batch) -> list[Prediction]:
        if not batch.conversations:
            return []
        module, processor = self.module, self.module.processor
        inputs = module.family.inputs(batch, generate=True)
        if batch.conversations[0].options:  # and those of all rows, see `CutRows`
            return choose(module.model, processor, inputs, batch.conversations)
        generation = module.generation
        if generation.compile == "auto":
            generation = replace(generation, compile=self.compiled)
        ids_of_rows = generation(
            module.model,
            inputs,
            stop_ids=processor.stop_ids,
            pad_id=processor.pad_id,
            image_keys=[image.key for image in batch.images],
        )
        predictions = []
        for ids, conversation in zip(ids_of_rows, batch.conversations, strict=True):
            prediction = processor.decode(ids, conversation)
            predictions.append(replace(prediction, tokens=len(ids)))
        return predictions
