"""Internals of torch.compile that this project uses because there is no public interface.

`tests/models/test_dynamo.py` fails if torch changes one of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from threading import get_ident
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

CompileError = TorchDynamoException  # raised by a function that cannot be compiled


def allow_recompilations(limit: int) -> None:
    """Increases the number of recompilations allowed per function to at least `limit`.

    If a function exceeds the limit, torch runs it uncompiled for further input shapes.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)


def recompilation_limits(*, per_function: int, in_total: int) -> AbstractContextManager[Any]:
    """Returns a context manager in which these recompilation limits replace the global ones.

    All calls of a thread return the same one. torch keeps 240 bytes of each that is made, and a
    server enters one for every token.
    """
    return _limits(get_ident(), per_function, in_total)


@cache
def _limits(thread: int, per_function: int, in_total: int) -> AbstractContextManager[Any]:
    return torch._dynamo.config.patch(
        recompile_limit=per_function, accumulated_recompile_limit=in_total
    )


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Asks the compiler to treat the size of `dim` as dynamic. The compiler may decline."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_graphs() -> int:
    """Returns the number of graphs compiled in this process."""
    return counters["stats"]["unique_graphs"]
