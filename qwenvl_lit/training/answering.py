"""How the LightningModule evaluates batches: their sizes, compilation and lack of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

from qwenvl_lit.data.batch_parts import split_by_options
from qwenvl_lit.generation.choices import choose
from qwenvl_lit.terminal import printable
from qwenvl_lit.training.halving import Halving
from qwenvl_lit.training.rows_together import batch_lines, choose_rows, compilation_saves

if TYPE_CHECKING:
    import lightning

    from qwenvl_lit.data.evaluation_batches import BatchChoice, EvaluationPlan, RowSizes
    from qwenvl_lit.types import Batch, ImageSource, Prediction


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

    def __call__(self, batch: Batch) -> list[Prediction]:
        """Answers each row of a batch of prompts."""
        if not batch.conversations:
            return []
        predictions: list[Prediction] = []
        for part in split_by_options(batch):
            predictions += chain.from_iterable(self.halving(self._answer, part))
        return predictions

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

    def _answer(self, batch: Batch) -> list[Prediction]:
        module, processor = self.module, self.module.processor
        inputs = module.family.inputs(batch, generate=True)
        if batch.conversations[0].options:  # and those of all rows, see `split_by_options`
            return choose(module.model, processor, inputs, batch.conversations)
        generation = module.generation
        if generation.compile == "auto":
            generation = replace(generation, compile=self.compiled)
        ids_of_rows = generation(
            module.model,
            inputs,
            stop_ids=processor.stop_ids,
            pad_id=processor.pad_id,
            image_keys=_image_keys(batch, len(inputs.get("pixel_values", ()))),
        )
        predictions = []
        for ids, conversation in zip(ids_of_rows, batch.conversations, strict=True):
            prediction = processor.decode(ids, conversation)
            predictions.append(replace(prediction, tokens=len(ids)))
        return predictions


def _image_keys(batch: Batch, count: int) -> list[str] | None:
    """Keys of the images of a batch's prompts, or None if these are not the `count` inputs.

    A long conversation loses its first turns, and their images.
    """
    images: list[ImageSource] = []
    for conversation in batch.conversations:
        images += conversation.prompt().images
    return [image.key for image in images] if len(images) == count else None
