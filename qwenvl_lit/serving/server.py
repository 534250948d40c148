"""Runs the application with uvicorn, from the start to the last answer after a stop signal."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from qwenvl_lit.generation.continuous import ContinuousBatching
from qwenvl_lit.serving.app import Application
from qwenvl_lit.stopping import STOP_SIGNALS
from qwenvl_lit.terminal import counted
from qwenvl_lit.types import DataError

CLOSING_SECONDS = 2.0  # of the grace time, to tell clients that their answers were cut
POLL_SECONDS = 0.05
ELSEWHERE = ("192.0.2.1", 9)  # an address for documentation (RFC 5737), beyond each network

log = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """A server that leaves signals to `serve`: it ends when `should_exit` is set."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]):
        super().__init__(config)
        self.on_start = on_start

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that has the address and does not listen yet.

    Raises:
        DataError: the address is taken, or does not exist here.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _name, address = found[0]
        bound = socket.socket(family, kind, protocol)
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "choose another port, or 0 for a free one"
        no_address = getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        if no_address or isinstance(error, socket.gaierror | UnicodeError):
            advice = "serve.host is an address of this machine: 127.0.0.1, or 0.0.0.0 for all"
        raise DataError(f"serve.host={host} serve.port={port}: {reason}; {advice}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Returns the address of a server for a browser: on this machine, or where others can connect,
    on their machines, too.
    """
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = _own_address()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_address() -> str:
    """Returns the address of this machine in its network, or its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)  # of a datagram socket: chooses a route, and sends nothing
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]


async def serve(
    application: Application,
    engine: ContinuousBatching,
    bound: socket.socket,
    *,
    grace_s: float,
    on_start: Callable[[], None],
) -> None:
    """Serves until a stop signal, then finishes what is being answered.

    After a signal new questions are refused. Answers may go on for `grace_s` seconds, or until a
    second signal.

    Args:
        on_start: called when clients can connect.
    """
    config = uvicorn.Config(
        application.app,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(CLOSING_SECONDS),
    )
    server = _Uvicorn(config, on_start)
    signals: list[int] = []
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is with `nohup`
            loop.add_signal_handler(number, signals.append, number)
    stopping = asyncio.create_task(_stop(application, engine, server, signals, grace_s))
    await server.serve(sockets=[bound])
    if not stopping.done():  # uvicorn has ended by itself
        stopping.cancel()


async def _stop(
    application: Application,
    engine: ContinuousBatching,
    server: uvicorn.Server,
    signals: list[int],
    grace_s: float,
) -> None:
    while not signals:
        await asyncio.sleep(POLL_SECONDS)
    admission = application.admission
    admission.is_open = False
    log.info("shutting down; %s to answer", counted(admission.taken, "request"))
    end = time.monotonic() + grace_s - CLOSING_SECONDS
    while admission.taken and time.monotonic() < end and len(signals) == 1:
        await asyncio.sleep(POLL_SECONDS)
    if admission.taken:
        log.warning("%s not answered to the end", counted(admission.taken, "request"))
    # Waits for its thread; clients are told meanwhile.
    await asyncio.to_thread(engine.close)
    server.should_exit = True
