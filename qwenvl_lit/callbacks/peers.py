"""The ranks of a run notice when one of them has ended, and end too."""

from __future__ import annotations

import logging
import os
import secrets
import select
import signal
import socket
import threading
import time
from typing import Any

import lightning

from qwenvl_lit.stopping import Stopped, signals

# What a rank writes to the others before it closes its connection
DONE, STOPPING, FAILED, LOST = b"d", b"s", b"f", b"l"
CONNECT_SECONDS = 10.0
# Seconds to wait, after a collective failed, for news that a rank has ended.
NEWS_SECONDS = 3.0
# Seconds to wait for this rank's own error after another rank has reported one.
OWN_ERROR_SECONDS = 2.5

log = logging.getLogger(__name__)

_open: set[socket.socket] = set()


def _close_in_child() -> None:
    """A data worker must not hold connections open that end with this process."""
    for connection in _open:
        connection.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Peers(lightning.Callback):
    """Ends all ranks within seconds after one was killed or has failed.

    Without it the other ranks would wait in a collective, up to NCCL's timeout of half an hour, or
    end in a traceback about a closed connection. Every rank keeps a connection to rank 0, which the
    kernel closes when the process ends. One line tells which rank was lost, and what was saved.

    A rank that a signal stops passes SIGTERM on to the others. With one process this callback only
    restores the signal handlers of the command, which Lightning replaces by its own. Lightning's
    handler sends a broadcast, which blocks in the middle of another collective.
    """

    def __init__(self) -> None:
        self._rank = 0
        self._connections: dict[int, socket.socket] = {}  # by rank
        self._ending = False  # this rank ends by itself

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        signals.admit()  # the other ranks have started
        if trainer.world_size > 1 and not self._connections:
            self._rank = trainer.global_rank
            self._connections = _connect(trainer)
            self._ending = False
            if self._connections:
                threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def on_train_start(self, *_: Any, **__: Any) -> None:
        signals.reinstall()

    on_test_start = on_predict_start = on_train_start

    def teardown(self, *_: Any, **__: Any) -> None:
        self._say_goodbye(DONE)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Tells the other ranks why this one ends.

        If the collective failed because a peer was lost, the watcher thread ends this process
        during the wait.
        """
        if isinstance(exception, RuntimeError) and self._connections:
            time.sleep(NEWS_SECONDS)
        farewell = FAILED
        if isinstance(exception, Stopped):
            farewell = STOPPING
        elif isinstance(exception, SystemExit):  # all ranks have agreed on it
            farewell = DONE
        self._say_goodbye(farewell)

    def _say_goodbye(self, farewell: bytes) -> None:
        self._ending = True
        for connection in self._connections.values():
            _send(connection, farewell)
        self._connections = {}

    def _watch(self) -> None:
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while ranks and not self._ending:
            for connection in select.select(list(ranks), [], [], 0.5)[0]:
                try:
                    farewell = connection.recv(1)
                except OSError:
                    farewell = b""
                self._react(ranks.pop(connection), farewell)

    def _react(self, rank: int, farewell: bytes) -> None:
        """Ends this rank because `rank` has ended, unless this rank is already ending."""
        if farewell == DONE or self._ending:
            return
        if farewell == STOPPING:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if farewell == FAILED:
            time.sleep(OWN_ERROR_SECONDS)
        if self._ending:
            return
        for other, connection in self._connections.items():
            if other != rank:
                _send(connection, LOST)
        if signals.arrived and farewell == b"":
            signals.end_after_signal(signals.arrived, f"; rank {rank} ended first")
        signals.end(self._line(rank, farewell), 1)

    def _line(self, rank: int, farewell: bytes) -> str:
        """What this rank prints: rank 0, or rank 1 if rank 0 was lost; "" for nothing."""
        if self._rank > 1 or farewell == LOST or (self._rank == 1 and farewell == FAILED):
            return ""
        cause = "was lost (killed? out of memory?)" if farewell == b"" else "failed, see above"
        return f"error: rank {rank} {cause}; the other ranks were stopped. {signals.kept}"


def _connect(trainer: lightning.Trainer) -> dict[int, socket.socket]:
    """Connects all ranks with rank 0; returns the connections of this rank.

    A cluster may not allow such connections. Then the run has none, and is warned.
    """
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    is_first = trainer.global_rank == 0
    server = socket.create_server(("", 0)) if is_first else None
    address = (server.getsockname()[1], secrets.token_bytes(16)) if server else None
    port, token = trainer.strategy.broadcast(address)
    connections: dict[int, socket.socket] = {}
    if server:
        with server:
            connections = _accept(server, token, trainer.world_size - 1)
    else:
        try:
            connection = socket.create_connection((host, port), CONNECT_SECONDS)
            connection.settimeout(None)
            connection.sendall(token + trainer.global_rank.to_bytes(4, "big"))
            connections = {0: connection}
        except OSError:
            connections = {}
    missing = trainer.world_size - 1 - len(connections) if is_first else 0
    if missing:
        log.warning("%d ranks cannot be watched: rank 0 is not reachable at %s", missing, host)
    for connection in connections.values():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host may vanish
        _open.add(connection)
    return connections


def _accept(server: socket.socket, token: bytes, count: int) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(connections) < count:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            greeting = connection.recv(20, socket.MSG_WAITALL)
        except OSError:
            break
        if greeting[:16] == token:  # not another program
            connection.settimeout(None)
            connections[int.from_bytes(greeting[16:], "big")] = connection
        else:
            connection.close()
    return connections


def _send(connection: socket.socket, farewell: bytes) -> None:
    """Writes the last byte to a rank, which may have ended already."""
    try:
        connection.sendall(farewell)
        connection.shutdown(socket.SHUT_WR)
    except OSError as error:
        log.debug("no farewell: %s", error)
    _open.discard(connection)
