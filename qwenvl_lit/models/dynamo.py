"""The internals of torch.compile that this project uses; torch has no public interface for them.

`tests/models/test_dynamo.py` fails when torch changes one of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

CompileError = TorchDynamoException  # what a compiled function raises if it cannot be compiled


def allow_recompilations(limit: int) -> None:
    """Raises the recompilations allowed per function to `limit`; never lowers them.

    Beyond the limit torch runs further variants of a function uncompiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)


def recompilation_limits(*, per_function: int, in_total: int) -> AbstractContextManager[Any]:
    """A context in which these limits replace the global ones."""
    return torch._dynamo.config.patch(
        recompile_limit=per_function, accumulated_recompile_limit=in_total
    )


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Asks the compiler to treat the size of `dim` as dynamic; it may still choose a static one."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_graphs() -> int:
    """Graphs compiled in this process: one per function and set of shapes."""
    return counters["stats"]["unique_graphs"]
