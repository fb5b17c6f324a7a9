"""Runs one Python program of unknown intent: its own process group, a folder of its own, and limits on what it may use.

This stops accidents, not attackers: the program runs as this user and can reach the network and readable files.  Against
programs that mean harm, run the workers in containers without secrets and without a network.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
REAP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """What a program may use.

    Attributes:
        memory_bytes: address space of each of its processes.
        output_bytes: size of its output, and of any file that it writes.
    """

    memory_bytes: int
    output_bytes: int = 2**24


class Program:
    """A program on disk, to be run several times; the context removes its folder and ends what the program left running.

    Args:
        source: Python source.
        limits: of every run.
    """

    def __init__(self, source: str, limits: ProgramLimits) -> None:
        self._source = source
        self._limits = limits
        self._folder = tempfile.TemporaryDirectory(prefix="rl-lightning-code-", ignore_cleanup_errors=True)

    def __enter__(self) -> Program:
        (Path(self._folder.name) / "program.py").write_text(self._source, encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *exc_info: object) -> None:
        _kill_those_at_home_in(self._folder.name)
        self._folder.cleanup()

    def run(self, text: str, timeout_s: float) -> str | None:
        """Its standard output for `text` on standard input; None if it fails, is stopped, or is not done in time."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
            given.write(text.encode("utf-8", errors="replace"))
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "program.py"],
                cwd=self._folder.name,
                env={"PATH": os.defpath, "HOME": self._folder.name, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"},
                stdin=given,
                stdout=written,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_confine(self._limits, timeout_s),
            )
            succeeded = _finished(process, timeout_s)
            written.seek(0)
            return written.read(self._limits.output_bytes).decode("utf-8", errors="replace") if succeeded else None


def _finished(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether the program ends by itself, in time and without error. Afterwards its process group is gone either way."""
    try:
        return process.wait(timeout_s) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(REAP_TIMEOUT_S)


def _kill_those_at_home_in(folder: str) -> None:
    """Ends processes that left the program's group for a session of their own: they still have its environment."""
    mark = f"HOME={folder}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)


def _confine(limits: ProgramLimits, timeout_s: float) -> Callable[[], None]:
    """What the new process does to itself before it becomes the program."""
    libc, parent = ctypes.CDLL(None), os.getpid()
    caps = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.output_bytes,
        resource.RLIMIT_CPU: math.ceil(timeout_s) + 1,
        resource.RLIMIT_CORE: 0,
    }

    def confine() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for kind, cap in caps.items():
            hard = resource.getrlimit(kind)[1]
            cap = cap if hard == resource.RLIM_INFINITY else min(cap, hard)
            resource.setrlimit(kind, (cap, cap))

    return confine
