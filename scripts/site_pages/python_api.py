"""Writes the page about the Python API, whose text Sphinx takes from docstrings."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """A part of the page: a title, a sentence, and the names of each module."""

    title: str
    about: str
    names: dict[str, tuple[str, ...]]


SECTIONS = (
    Section(
        "Models",
        "`QwenVL` loads a model and answers questions ([examples](../python.md)).",
        {
            "qwenvl_lit.api": ("QwenVL",),
            "qwenvl_lit.generation.answer": ("Answer",),
            "qwenvl_lit.generation.generation": ("Generation",),
        },
    ),
    Section(
        "Types",
        "The values that readers, models and metrics pass to each other.",
        {
            "qwenvl_lit.types": (
                "Conversation",
                "Turn",
                "ImageSource",
                "GroundedObject",
                "Box",
                "Quad",
                "Prediction",
                "Sample",
                "Batch",
                "DataError",
                "BadImage",
                "Dropped",
            ),
        },
    ),
    Section(
        "Boxes",
        "Conversion between frames, overlap, and markup.",
        {
            "qwenvl_lit.grounding": (
                "to_frame",
                "object_in_frame",
                "iou",
                "tags_from_object",
                "objects_from_tags",
            ),
        },
    ),
    Section(
        "Data",
        "What a reader of yours calls or replaces ([extending](../extending.md)).",
        {
            "qwenvl_lit.data.readers.sources": ("read_rows",),
            "qwenvl_lit.data.readers.rows": ("ReadOptions", "conversation_from", "image_from"),
            "qwenvl_lit.data.datamodule": ("DataModule",),
        },
    ),
    Section(
        "Metrics",
        "The base classes, from which a metric of yours derives, then the metrics themselves.",
        {
            "qwenvl_lit.metrics.sample_mean": ("SampleMean", "ProtocolMean"),
            "qwenvl_lit.metrics.per_sample": ("PerSampleMetric",),
            "qwenvl_lit.metrics.exact_match": ("ExactMatch",),
            "qwenvl_lit.metrics.boxes": ("BoxAccuracy", "MeanIoU", "GroundedAccuracy"),
            "qwenvl_lit.metrics.captions": ("CIDEr", "Bleu", "RougeL"),
            "qwenvl_lit.metrics.anls": ("ANLS",),
            "qwenvl_lit.metrics.vqa_accuracy": ("VQAAccuracy",),
            "qwenvl_lit.metrics.relaxed_accuracy": ("RelaxedAccuracy",),
            "qwenvl_lit.metrics.gqa_accuracy": ("GQAAccuracy",),
            "qwenvl_lit.metrics.choice_accuracy": ("ChoiceAccuracy",),
        },
    ),
    Section(
        "Protocols of a model family",
        "What a model implements ([add a model family](../extending.md#add-a-model-family)).",
        {
            "qwenvl_lit.models.protocols": (
                "Family",
                "Processor",
                "Network",
                "Decoder",
                "Prompts",
                "RunningRows",
                "FeatureSource",
            ),
        },
    ),
)


def api_page() -> str:
    """Returns the page, with a directive of Sphinx for each name."""
    parts = [
        "# Python API: reference",
        "Every class and function that is meant to be used from outside, with its docstring.",
        '```\npython -c "from qwenvl_lit import QwenVL; help(QwenVL)"\n```',
    ]
    for section in SECTIONS:
        parts += [f"## {section.title}", section.about]
        for module, names in section.names.items():
            parts += [_directive(module, name) for name in names]
    return "\n\n".join(parts) + "\n"


def _directive(module: str, name: str) -> str:
    if name[0].islower():
        return f"```{{eval-rst}}\n.. autofunction:: {module}.{name}\n```"
    return f"```{{eval-rst}}\n.. autoclass:: {module}.{name}\n   :members:\n```"
