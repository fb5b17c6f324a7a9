"""Turn: one run of one system in fresh processes, and what was measured of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import psutil


class TurnError(RuntimeError):
    """A system failed or was too slow; the message ends with its last words."""


@dataclass
class Turn:
    """What a run reported.

    Attributes:
        about: versions and settings, from the system itself.
        steps: the measured steps, as reported.
        cpu_s: CPU seconds of all its processes during these steps.
        wall_s: seconds of the whole run, start-up included.
        loadavg: of the machine over the last minute, when the run ended.
    """

    about: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0
    loadavg: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the seconds of the measured steps."""
        return sum(step["tokens"] for step in self.steps) / sum(step["seconds"] for step in self.steps)

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return sum(step["seconds"] for step in self.steps) / len(self.steps)

    @property
    def cpu_s_per_step(self) -> float:
        """Mean CPU seconds of a step."""
        return self.cpu_s / len(self.steps)


def take_turn(command: Sequence[str], warmup: int, steps: int, timeout_s: float) -> Turn:
    """Runs `command`, which reports its steps by `StepReporter`, and measures `steps` of them after the first `warmup`.

    Raises:
        TurnError: it failed, or did not end within `timeout_s`.
    """
    turn, started, cpu_s = Turn(), time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as log, started_process(command, log, timeout_s) as process:
        assert process.stdout is not None
        for line in filter(is_report, process.stdout):
            report = json.loads(line)
            turn.about |= report.get("about", {})
            number = report.get("step", 0)
            if warmup < number <= warmup + steps:
                turn.steps.append({name: round(value, 4) for name, value in report.items()})
            if number == warmup:
                cpu_s = tree_cpu_s(process.pid)
            if number == warmup + steps:
                turn.cpu_s = tree_cpu_s(process.pid) - cpu_s
        code, turn.wall_s = process.wait(), time.perf_counter() - started
        if code or len(turn.steps) < steps:
            log.seek(0)
            why = f"did not end within {timeout_s:.0f} s" if turn.wall_s > timeout_s else f"ended with code {code}"
            raise TurnError(f"{why}; its output ends: {log.read()[-1500:]}")
    turn.loadavg = round(os.getloadavg()[0], 2)
    return turn


def is_report(line: str) -> bool:
    """Whether a line of a system's output is one of `StepReporter`'s."""
    return line.startswith(('{"about"', '{"step"'))


@contextlib.contextmanager
def started_process(command: Sequence[str], log: IO[str], timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    """`command` in a session of its own, killed after `timeout_s` and whenever the block is left."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    timer = threading.Timer(timeout_s, kill_tree, [process.pid])
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        kill_tree(process.pid)
        process.wait()


def kill_tree(pid: int) -> None:
    """Kills a process and all its descendants."""
    for process in reversed(tree(pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def tree_cpu_s(pid: int) -> float:
    """CPU seconds that a process and its living descendants have used."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants; empty if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
