"""Progress bars for work outside Lightning's loops."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from qwenvl_lit.terminal import printable


@contextmanager
def progress_bars(
    *, enabled: bool = True, seconds_per_line: float | None = None
) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function `report(name, done, total)` that draws a bar for each name.

    The bars are drawn only if standard output is a terminal, and disappear at the end of the
    `with` block.

    Args:
        enabled: whether to show progress. Ranks other than 0 pass False.
        seconds_per_line: seconds between lines that are printed if standard output is not a
            terminal. With None, no lines are printed.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    on_terminal = sys.stdout.isatty()
    prints_lines = enabled and not on_terminal and seconds_per_line is not None
    bars: dict[str, TaskID] = {}
    last_line = time.monotonic()
    with Progress(*columns, transient=True, disable=not (enabled and on_terminal)) as progress:

        def report(name: str, done: int, total: int) -> None:
            nonlocal last_line
            name = printable(name)
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done)
            if prints_lines and time.monotonic() - last_line > seconds_per_line:
                last_line = time.monotonic()
                print(f"{name}: {done:,} of {total:,}", flush=True)

        yield report
