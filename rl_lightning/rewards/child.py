"""The inside of a reward process: reads jobs from a socket, runs rewards in its main thread, answers cell by cell.

Frames are a 4-byte length and a pickle.  Parent: one `Init`, then any number of `Job`.  Child: one `Ready` or
`LoadFailed`, then one `CellResult` for each cell of a job, in the job's order.
"""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_lightning.types import Prompt

HEADER = struct.Struct("!I")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Init:
    """What a fresh process is told: where to import from, what to score with, and how much memory that may take."""

    sys_path: list[str]
    rewards: list[bytes]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The rewards are loaded and set up."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Reward number `reward` could not be loaded or set up."""

    reward: int
    message: str


@dataclass(frozen=True, slots=True)
class Job:
    """Cells (answer, reward) to score for one prompt."""

    prompt: Prompt
    answers: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CellResult:
    """One cell's value, or why there is none (`error` or `memory`)."""

    value: float
    failure: str | None = None
    message: str = ""


def main(fd: int, parent_pid: int) -> None:
    """Serves the socket `fd` until the parent closes it."""
    _die_with(parent_pid)
    with socket.socket(fileno=fd) as channel:
        rewards = _load(channel, receive(channel))
        if rewards is None:
            return
        while True:
            try:
                job = receive(channel)
            except EOFError:
                return
            if not _serve(channel, rewards, job):
                return


def send(channel: socket.socket, message: object) -> None:
    """Writes one frame."""
    channel.sendall(frame(message))


def frame(message: object) -> bytes:
    """`message` as it travels."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def receive(channel: socket.socket) -> Any:
    """Reads one frame.

    Raises:
        EOFError: the other side closed.
    """
    (size,) = HEADER.unpack(_read(channel, HEADER.size))
    return pickle.loads(_read(channel, size))


def _read(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise EOFError("the other side closed")
        data += part
    return bytes(data)


def _die_with(parent_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _load(channel: socket.socket, init: Init) -> list[Callable[[Prompt, str], float]] | None:
    sys.path[:] = init.sys_path
    rewards = []
    for number, pickled in enumerate(init.rewards):
        try:
            reward = pickle.loads(pickled)
            getattr(reward, "setup", _nothing)()
        except Exception as error:  # noqa: BLE001 - user code may raise anything; it is reported and ends this process
            send(channel, LoadFailed(number, f"{type(error).__name__}: {error}"))
            return None
        rewards.append(reward)
    _limit_memory(init.memory_bytes)
    send(channel, Ready())
    return rewards


def _nothing() -> None:
    """Stands in for a reward's missing `setup`."""


def _limit_memory(extra_bytes: int) -> None:
    """Caps the address space at what is mapped now plus `extra_bytes`, so that imports do not count."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _serve(channel: socket.socket, rewards: list[Callable[[Prompt, str], float]], job: Job) -> bool:
    """Answers all cells. False after a memory failure: what is left of this process is not to be trusted."""
    process = os.getpid()
    for answer, reward in job.cells:
        result = _score(rewards[reward], job.prompt, job.answers[answer])
        if os.getpid() != process:
            os._exit(1)  # a fork that the reward made and did not end: its word would be taken for the next cell's
        send(channel, result)
        if result.failure == "memory":
            return False
    return True


def _score(reward: Callable[[Prompt, str], float], prompt: Prompt, answer: str) -> CellResult:
    try:
        value = float(reward(prompt, answer))
    except MemoryError:
        return CellResult(0.0, "memory", "it ran into the memory limit")
    except Exception as error:  # noqa: BLE001 - user code may raise anything; it is counted by the parent
        return CellResult(0.0, "error", f"{type(error).__name__}: {error}"[:500])
    if not math.isfinite(value):
        return CellResult(0.0, "error", f"it returned {value}")
    return CellResult(value)
