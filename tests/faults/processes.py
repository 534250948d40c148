"""Commands as processes that can be killed, and what a command did that has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from commands import command_line, environment, run_command

MARK = "QWENVL_LIT_FAULT_MARK"  # in the environment of a command and of all that it starts
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Started:
    """A command in a session of its own. Leaving the block ends all that it has started."""

    def __init__(self, folder: Path, command: str, *arguments: str):
        self.mark = uuid.uuid4().hex
        self._output = folder / f"output_{self.mark}.txt"
        with self._output.open("wb") as stream:
            self.process = subprocess.Popen(
                command_line(command, *arguments),
                cwd=folder,
                env=environment(folder, **{MARK: self.mark}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._output.unlink()

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def cpu_seconds(self) -> float:
        """CPU time of the first process: a measure of its progress on a busy machine, too."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND

    def alive(self) -> list[int]:
        """The processes that this command has started and that have not ended."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    pids.append(int(folder.name))
            except OSError:
                continue  # it has ended, or belongs to another user
        return pids

    def wait_until_gone(self, seconds: float) -> list[int]:
        """Waits for all processes of the command; returns those that are left."""
        end = time.monotonic() + seconds
        while True:
            # A process that is about to end has no environment any more.
            alive = self.alive() or [self.process.pid] * self.is_running
            if not alive or time.monotonic() > end:
                return alive
            time.sleep(0.1)


@dataclass(frozen=True)
class Finished:
    """How a forked command ended."""

    status: int | None  # None: it did not end in time
    output: str  # standard output and standard error

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def refuses(self, *words: str) -> None:
        """Asserts that the command refused its input in one line that has `words` in it."""
        self.has_no_traceback()
        last = self.output.strip().splitlines()[-1:]
        assert self.status in (1, 2), f"exit status {self.status}, last line {last}"
        assert len(self.errors) == 1, f"{len(self.errors)} lines of error: {self.errors}, {last}"
        after = self.output.partition(self.errors[0])[2].strip()
        assert not after, f"the message has several lines: {self.errors[0]} | {after[:200]}"
        for word in words:
            assert word in self.errors[0], f"{word!r} is not in {self.errors[0]!r}"

    def refuses_or_works(self) -> None:
        """Asserts that the command succeeded or refused its input in one line."""
        if self.status == 0:
            self.has_no_traceback()
        else:
            self.refuses()

    def has_no_traceback(self) -> None:
        assert self.status is not None, f"it hangs; it printed {self.output[-300:]!r}"
        tail = [line for line in self.output.splitlines() if line.strip()][-1:]
        assert "Traceback (most" not in self.output, f"a traceback that ends in {tail}"
        assert "weights_only=False" not in self.output, "torch's advice to execute pickles"


def fork_command(
    folder: Path,
    command: str,
    *arguments: str,
    seconds: float = 60,
    file_limit: int | None = None,
    **variables: str,
) -> Finished:
    """Runs a command as `run_command` does; it hangs if it takes more than `seconds`."""
    try:
        process = run_command(
            folder, command, *arguments, seconds=seconds, file_limit=file_limit, **variables
        )
    except subprocess.TimeoutExpired as error:
        return Finished(None, f"{error.stdout}{error.stderr}")
    return Finished(process.returncode, process.stdout + process.stderr)
