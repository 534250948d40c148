"""Chooses how many answers a server generates together, and how long they may be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qwenvl_lit.data.evaluation_batches import RowSizes
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.protocols import Family, Processor
from qwenvl_lit.serving.settings import ServeSettings
from qwenvl_lit.training.rows_together import SMALL_MODEL, free_memory, rows_that_fit
from qwenvl_lit.types import QUESTION_ID, Conversation, Turn

USUAL_CONTEXT = 2048  # tokens within which Qwen-VL needs no dynamic NTK
MOST_ROWS = 32
ROWS_OF_A_CPU = 4  # of a large model


def with_capacity(settings: ServeSettings, *, model: nn.Module, family: Family) -> ServeSettings:
    """Returns settings with numbers in place of "auto" in `rows` and `context`.

    Raises:
        ValueError: the model reads fewer tokens than `serve.context`.
    """
    check_context(settings, family)
    context = settings.context
    if context == "auto":
        context = min(USUAL_CONTEXT, family.max_tokens)
    rows = settings.rows
    if rows == "auto":
        rows = _rows(context, model, family)
    return replace(settings, rows=rows, context=context)


def check_context(settings: ServeSettings, family: Family) -> None:
    """Raises a ValueError if the model reads fewer tokens than `serve.context`."""
    if settings.context != "auto" and settings.context > family.max_tokens:
        raise ValueError(
            f"serve.context={settings.context} is more than the {family.max_tokens} tokens that "
            f"the model reads"
        )


def check_room(settings: ServeSettings, processor: Processor) -> None:
    """Raises a ValueError if the shortest question leaves no room for an answer."""
    turns = (Turn(role="user", parts=("?",)),)
    shortest = processor.encode(Conversation(id=QUESTION_ID, turns=turns), prompt=True)
    tokens = len(shortest.input_ids)
    if settings.context <= tokens:
        raise ValueError(
            f"serve.context={settings.context} has no room for an answer: the shortest prompt has "
            f"{tokens} tokens"
        )


def _rows(context: int, model: nn.Module, family: Family) -> int:
    parameters = list(model.parameters())
    device = parameters[0].device
    if device.type != "cuda":
        small = sum(tensor.numel() for tensor in parameters) < SMALL_MODEL
        return MOST_ROWS if small else ROWS_OF_A_CPU
    sizes = RowSizes(
        rows=MOST_ROWS,
        tokens=context - 1,
        supervised=0,
        image_tokens=0,  # images are encoded a few at a time
        answered=True,
        options=False,
    )
    generation = Generation(max_new_tokens=1)
    with torch.cuda.device(device):
        return rows_that_fit(sizes, MOST_ROWS, family, generation, free_memory(device))
