"""Counts the attempts of the bench, for its assertion and for benchmarks/faults.json."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

RECORD = "QWENVL_LIT_FAULTS_RECORD"  # names the folder of the counts; scripts/run_faults.py sets it

# Parameters of a test of the bench: few attempts in the default suite, many with `make faults`
SHORT, FULL = "short", "full"


def sizes(short: Any, full: Any) -> Any:
    """Parametrizes `size` with the short and the full form of a test; None leaves a form out."""
    forms = []
    if short is not None:
        forms.append(pytest.param(short, id=SHORT))
    if full is not None:
        forms.append(pytest.param(full, id=FULL, marks=pytest.mark.faults))
    return pytest.mark.parametrize("size", forms)


class Attempt:
    """One attempt; `count` faults are counted as passed or failed together."""

    def __init__(self) -> None:
        self.count = 1


class Tally:
    """The attempts of one kind of fault.

    >>> tally = Tally("numbers", "division")
    >>> with tally.attempt("by zero"):
    ...     _ = 1 / 0
    >>> tally.tried, tally.passed, tally.failed
    (1, 0, ['by zero: ZeroDivisionError: division by zero'])
    """

    def __init__(self, group: str, kind: str):
        self.group = group
        self.kind = kind
        self.tried = 0
        self.passed = 0
        self.failed: list[str] = []
        self.measured: dict[str, Any] = {}  # what the record says beside the counts
        self._start = time.monotonic()

    @contextmanager
    def attempt(self, name: str) -> Iterator[Attempt]:
        """Counts the block as passed, or as failed with its exception, and goes on."""
        attempt = Attempt()
        try:
            yield attempt
        except (KeyboardInterrupt, GeneratorExit, pytest.exit.Exception):
            raise
        except BaseException as error:  # also a panic of a library in Rust
            lines = str(error).splitlines() or [""]
            self.failed.append(f"{name}: {type(error).__name__}: {lines[0]:.400}")
        else:
            self.passed += attempt.count
        self.tried += attempt.count

    def row(self) -> dict[str, Any]:
        counts = {"tried": self.tried, "passed": self.passed, "failed": self.failed}
        seconds = round(time.monotonic() - self._start, 1)
        return {
            "group": self.group,
            "kind": self.kind,
            **counts,
            **self.measured,
            "seconds": seconds,
        }


@contextmanager
def tallied(group: str, kind: str) -> Iterator[Tally]:
    """A tally that is recorded at the end of the block, which fails if an attempt has failed."""
    tally = Tally(group, kind)
    try:
        with tally.attempt("the test itself") as whole:
            whole.count = 0
            yield tally
    finally:
        folder = os.environ.get(RECORD)
        if folder:
            row = json.dumps(tally.row(), ensure_ascii=False)
            Path(folder, f"{uuid.uuid4().hex}.json").write_text(row, encoding="utf-8")
    assert tally.tried, f"{kind}: nothing was tried"
    failures = "\n".join(tally.failed)
    assert not failures, f"{group}, {kind}: {tally.passed} of {tally.tried} passed\n{failures}"
