"""SimulatedLoop: an asyncio event loop in which waiting takes no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Its `time()` starts at 0 and jumps to the next timer whenever no coroutine can go on.

    Order is that of the timers, and of their creation where they are equal, so a run is a function of its inputs. For
    coroutines that wait for each other and for time only: files, threads and processes have no place in it.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Simulated seconds since the loop was made."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Moves time forward; called by the loop's own selector."""
        self._now_s += seconds


class _JumpingSelector(selectors.SelectSelector):
    """Where a loop would sleep until a file is ready, time moves on instead."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Passes `timeout` seconds.

        Raises:
            RuntimeError: no coroutine can go on, now or later.
        """
        if timeout is None:
            raise RuntimeError("the simulation hangs: every coroutine waits for another one and none for time")
        self._loop.advance(timeout)
        return []


def simulate(coroutine: Coroutine[Any, Any, T]) -> T:
    """Result of `coroutine`, run in simulated time from 0 on."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(coroutine)
