"""GenerationGate: lets generation run between weight updates, never during one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rl_lightning.engines.engine import EngineError


class GenerationGate:
    """Open with a version, closed for an update, or failed. Belongs to one event loop.

    Attributes:
        version: of the weights that everything inside the gate is sampled with.
        running: number of segments inside.
    """

    def __init__(self) -> None:
        self.version = 0
        self.running = 0
        self._failure = ""
        self._changed = asyncio.Event()
        self._open = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        """Whether generation may run."""
        return self._open

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[int]:
        """Waits for the gate to open and stays inside; gives the version, which holds until it is left.

        Raises:
            EngineError: the gate failed.
        """
        while not self._open:
            if self._failure:
                raise EngineError(self._failure)
            self._changed.clear()
            await self._changed.wait()
        self.running += 1
        self._empty.clear()
        try:
            yield self.version
        finally:
            self.running -= 1
            if not self.running:
                self._empty.set()

    def close(self) -> None:
        """Lets nobody in any more."""
        self._open = False

    def open(self, version: int) -> None:
        """Lets everybody in, under `version`."""
        self.version, self._failure, self._open = version, "", True
        self._changed.set()

    def fail(self, message: str) -> None:
        """Refuses everybody with `message` until opened again."""
        self._open, self._failure = False, message
        self._changed.set()

    async def empty(self, timeout_s: float) -> bool:
        """Whether nobody is inside, waiting for that no longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
