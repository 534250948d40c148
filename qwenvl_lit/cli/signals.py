"""Ends a stopped command with one line and the exit status that a shell expects."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from qwenvl_lit.stopping import Stopped, exit_status, is_first_rank, signals


@contextmanager
def stops_reported(command: str) -> Iterator[None]:
    """Lets stop signals end the block, and prints what was kept.

    Ctrl-C during `chat` stays a KeyboardInterrupt, which ends an answer.
    """
    try:
        signals.install(ctrl_c=command != "chat")
        yield
    except Stopped as stop:
        _exit(stop.number, stop.__cause__)
    except KeyboardInterrupt:
        _exit(signal.SIGINT)
    except Exception as error:
        if not signals.received:
            raise
        _exit(signals.received, error)
    finally:
        # This rank has nothing left to stop. If a signal killed it in its last moments, Lightning
        # would kill rank 0, which may still write its results or say that it was stopped.
        if not is_first_rank():
            signals.ignore()


def _exit(number: int, cause: BaseException | None = None) -> NoReturn:
    """Exits after the signal `number`, or after the error that the signal has caused."""
    reason = ""
    if cause is not None:
        message = str(cause).strip().partition("\n")[0]
        reason = f" ({type(cause).__name__}: {message})"
    if not is_first_rank():
        sys.exit(0)  # Lightning kills rank 0 when another rank ends with an error
    logging.disable()  # libraries log when the interpreter exits
    print(f"\n{signals.line(number, reason)}", file=sys.stderr, flush=True)
    sys.exit(exit_status(number))
