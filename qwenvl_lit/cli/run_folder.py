"""Creates and locks the run folder: a new one, or the one named on the command line."""

from __future__ import annotations

import atexit
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from qwenvl_lit.atomic import disk_errors
from qwenvl_lit.cli.overrides import quote, value_of
from qwenvl_lit.cli.ranks import is_under_torchrun, share_folder
from qwenvl_lit.locks import WAIT_SECONDS, ProcessLock, lock_of, read_holder
from qwenvl_lit.stopping import is_first_rank
from qwenvl_lit.types import DataError


class ClaimRunFolder(Callback):
    """Creates and locks the folder of a run or of a sweep before Hydra writes to it.

    Without `hydra.run.dir=` or `hydra.sweep.dir=` the folder is new: a name that is taken gets a
    suffix, `_2`, `_3` and so on. A named folder may exist. The lock ends with this process. The
    other ranks of a run share the folder of rank 0 and do not lock it.
    """

    claimed: ClassVar[ClaimRunFolder | None] = None  # of this process

    def __init__(self) -> None:
        self.folder = Path()
        self.is_new = False  # this process created the folder
        self.is_sweep = False
        self.hydra_folder: str | None = None  # where Hydra writes its config

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        self._claim(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._claim(config, "sweep")

    def _claim(self, config: DictConfig, kind: Literal["run", "sweep"]) -> None:
        self.is_sweep = kind == "sweep"
        self.hydra_folder = config.hydra.output_subdir
        key = f"hydra.{kind}.dir"
        named = value_of(list(config.hydra.overrides.hydra), key) is not None
        shares_name = kind == "run" and is_under_torchrun() and not named
        with _hydra_config(config):
            self.folder = Path(config.hydra[kind].dir).expanduser()
        try:
            if is_first_rank():
                with disk_errors(
                    self.folder, f"free disk space, or choose another folder with {key}="
                ):
                    self._create(named=named, key=key)
                ClaimRunFolder.claimed = self
            if shares_name:
                self.folder = Path(share_folder(str(self.folder)))
        except DataError as error:
            # Hydra turns other exceptions of a callback into warnings.
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra[kind].dir = str(self.folder)
            if kind == "sweep":  # Hydra composes each of its jobs from the overrides again
                config.hydra.overrides.hydra.append(f"{key}={quote(str(self.folder))}")

    def _create(self, *, named: bool, key: str) -> None:
        """Makes and locks the folder.

        Raises:
            DataError: another process has locked it.
        """
        if named:
            deadline = time.monotonic() + WAIT_SECONDS
            while not self._lock_named():
                if time.monotonic() > deadline:
                    holder = read_holder(lock_of(self.folder)) or "another process"
                    raise DataError(
                        f"{self.folder} is used by {holder}; wait until it has ended, "
                        f"or choose another folder with {key}="
                    )
                time.sleep(0.1)
            return
        first = self.folder
        for number in count(1):
            self.folder = first if number == 1 else first.with_name(f"{first.name}_{number}")
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                continue
            self.is_new = True
            if self._lock():
                return

    def _lock_named(self) -> bool:
        try:
            self.folder.mkdir(parents=True)
            self.is_new = True
        except FileExistsError:
            if not self.folder.is_dir():
                raise
        try:
            return self._lock()
        except FileNotFoundError:  # its owner was refused, and has removed it in the meantime
            return False

    def _lock(self) -> bool:
        lock = ProcessLock(lock_of(self.folder))
        if not lock.acquire():
            return False
        atexit.register(lock.release)
        return True

    def remove_unused(self) -> None:
        """Removes the folder of a run if this process created it and wrote no result.

        Hydra's config, empty logs and the lock are no results.
        """
        if self.is_sweep or not self.is_new or not self.folder.exists():
            return
        own = {self.hydra_folder, lock_of(self.folder).name}
        for file in self.folder.iterdir():
            is_empty_log = file.suffix == ".log" and file.stat().st_size == 0
            if file.name not in own and not is_empty_log:
                return
        shutil.rmtree(self.folder)


@contextmanager
def _hydra_config(config: DictConfig) -> Iterator[None]:
    """Lets `${hydra:...}` be resolved, which Hydra does only when it runs a job."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(config)
    try:
        yield
    finally:
        instance.cfg = before


def remove_unused_folder() -> None:
    """Removes the run folder of a command that was refused before it wrote anything.

    Jobs of a sweep, resumed runs and named folders that existed before keep theirs.
    """
    claimed = ClaimRunFolder.claimed
    if claimed is not None:
        claimed.remove_unused()
