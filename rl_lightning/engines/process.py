"""ServerProcess: a server that this process owns, from start to the last of its descendants."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PARENT = "RL_LIGHTNING_PARENT"
PR_SET_PDEATHSIG = 1
POLL_S = 0.02


class ServerProcess:
    """A child that leads a session of its own, so that it and all that it starts can be ended together.

    The child should call `die_with_parent` first thing, which ends it when the thread that started it ends.

    Args:
        command: program and arguments.
        log_path: takes what it prints; made for this user alone, as servers may print their settings.
        env: changes to this process's environment.
    """

    def __init__(self, command: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None) -> None:
        self.log_path = log_path
        with open(log_path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {}), PARENT: str(os.getpid())},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id, and id of its group."""
        return self._process.pid

    def running(self) -> bool:
        """Whether the server itself still runs."""
        return self._process.poll() is None

    def cause_of_death(self) -> str:
        """How it ended, with its last words; empty while it runs."""
        code = self._process.poll()
        if code is None:
            return ""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"process {self.pid} {how}; its log ends: {self.tail()}"

    def tail(self, n_bytes: int = 2000) -> str:
        """The end of its log."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - n_bytes))
            return log.read().decode(errors="replace").strip()

    def survivors(self) -> list[int]:
        """Processes of the group that still run."""
        import psutil

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getpgid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def stop(self, gone_within_s: float = 10.0) -> None:
        """Kills the group and returns when none of it runs. Blocks; idempotent.

        Raises:
            TimeoutError: something outlives even the kill (a process stuck in the kernel).
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + gone_within_s
        while (left := self.survivors()) or self.running():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {left} of server {self.pid} outlived SIGKILL for {gone_within_s:.0f} s")
            time.sleep(POLL_S)


def die_with_parent() -> None:
    """In the child: be killed when the thread that started it ends, or now if that has happened already. Linux only."""
    if sys.platform != "linux" or (parent := os.environ.get(PARENT)) is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
