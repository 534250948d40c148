"""Imports the large libraries faster than import statements do."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Sequence

LARGE = ("torch", "transformers.modeling_utils", "transformers.generation.utils", "lightning")


def import_libraries(names: Sequence[str] = LARGE) -> None:
    """Imports libraries without garbage collection, and exempts their objects from it.

    The imports make 480,000 objects. Collections look at all of them again and again, which takes a
    quarter of the time, and find almost nothing. Later a full collection would take 0.3 s, and
    Python makes several when it exits. Frozen objects also stay in the memory that data workers
    share with this process.

    If the first library is imported already, nothing is frozen: objects of a run would never be
    freed.
    """
    freeze = names[0] not in sys.modules
    enabled = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
        if freeze:
            gc.freeze()
    finally:
        if enabled:
            gc.enable()
