"""Recognizes boxes that are written as other models write them, which are trained as plain text."""

from __future__ import annotations

import re

_INTEGER = r"\s*-?\d+\s*"
_FRACTION = r"\s*[01]?\.\d+\s*"
_HUNDREDTHS = r"[01]\.\d\d,[01]\.\d\d"  # as SeeClick writes a point, and nobody else
_FORMS = (
    ("Qwen2-VL (<|box_start|>)", re.compile(r"<\|(?:box|object_ref|quad)_(?:start|end)\|>")),
    ("Qwen2.5-VL and Qwen3-VL (JSON with bbox_2d)", re.compile(r"""["']bbox_2d["']\s*:""")),
    ("PaliGemma (<loc0000>)", re.compile(r"<loc\d{4}>")),
    ("Kosmos-2 (<patch_index_0000>)", re.compile(r"<patch_index_\d{4}>")),
    ("InternVL (<box>[[...]]</box>)", re.compile(r"<box>\s*\[")),
    ("SeeClick ((0.17,0.06))", re.compile(rf"\({_HUNDREDTHS}(?:,{_HUNDREDTHS})?\)")),
    (
        "LLaVA or Shikra ([0.1,0.2,0.3,0.4])",
        re.compile(rf"\[{_FRACTION}(?:,{_FRACTION}){{3}}\]"),
    ),
    (
        "lists of whole numbers ([10,20,30,40])",
        re.compile(rf"\[{_INTEGER}(?:,{_INTEGER}){{3}}\]"),
    ),
)


def box_form(text: str, own: str | None = None) -> str | None:
    """Returns the first form of other models in which `text` has a box, as "NAME (EXAMPLE)".

    Args:
        own: the form that is the model's own; text with it has no other one.

    >>> box_form("It is at [0.1, 0.25, 0.5, 1.0].")
    'LLaVA or Shikra ([0.1,0.2,0.3,0.4])'
    """
    if not any(sign in text for sign in ("[", "<", "(", "bbox_2d")):
        return None
    for name, pattern in _FORMS:
        if pattern.search(text):
            return None if name == own else name
    return None
