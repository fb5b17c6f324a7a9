"""Rewards that behave badly on purpose, in a module that reward processes can import."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from rl_lightning.types import Prompt


def length(prompt: Prompt, answer: str) -> float:
    return len(answer)


def half(prompt: Prompt, answer: str) -> float:
    return 0.5


def faulty(prompt: Prompt, answer: str) -> float:
    """Does what the answer says."""
    if answer == "raise":
        raise KeyError("no such thing")
    if answer == "nan":
        return float("nan")
    if answer == "hang":
        time.sleep(60)
    if answer == "spin":
        while True:
            pass
    if answer == "eat":
        return float(len(bytearray(10 * 2**30)))
    if answer == "exit":
        sys.exit(3)
    if answer == "die":
        os.abort()
    if answer == "killed":
        os.kill(os.getpid(), 9)
    if answer == "fork":
        child = os.fork()
        if child == 0:
            return 9.0
        os.waitpid(child, 0)
    if answer == "print":
        print("noise on standard output", flush=True)
    return 1.0


def pid(prompt: Prompt, answer: str) -> float:
    return os.getpid()


def slow(prompt: Prompt, answer: str) -> float:
    time.sleep(0.1)
    return 1.0


def spawns_and_hangs(prompt: Prompt, answer: str) -> float:
    """Writes the id of a grandchild to the file named by the answer, then hangs."""
    child = subprocess.Popen(["sleep", "60"])
    Path(answer).write_text(str(child.pid))
    time.sleep(60)
    return 1.0


def spawns_and_dies(prompt: Prompt, answer: str) -> float:
    """As `spawns_and_hangs`, but aborts."""
    child = subprocess.Popen(["sleep", "60"])
    Path(answer).write_text(str(child.pid))
    os.abort()


def is_gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether process `pid` ends within some seconds."""
    deadline = time.monotonic() + within_s
    stat = Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


class NeedsSetup:
    """Slow to set up; scores 1 where it was."""

    ready = False

    def setup(self) -> None:
        time.sleep(0.5)
        self.ready = True

    def __call__(self, prompt: Prompt, answer: str) -> float:
        return float(self.ready)


class BrokenSetup(NeedsSetup):
    def setup(self) -> None:
        raise ImportError("no module named 'sympathy'")


class OnlyInParent:
    """Pickles here, does not load there."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _load_where_born, (str(os.getpid()),)

    def __call__(self, prompt: Prompt, answer: str) -> float:
        return 1.0


def _load_where_born(parent: str) -> OnlyInParent:
    if str(os.getpid()) != parent:
        raise ModuleNotFoundError("No module named 'notebook_cell'")
    return OnlyInParent()


class Unannotated:
    def __init__(self, factor=2):
        self.factor = factor

    def __call__(self, question, text):
        return self.factor * len(text)


def unannotated(question, text):
    return len(text)
