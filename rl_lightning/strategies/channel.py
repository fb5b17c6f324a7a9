"""RunChannel: what passes between the driver and the ranks while a run is under way.

Events (progress, log records) go up from the ranks; the wish to stop comes down, and the ranks agree on the place where
they do.  The channel is an actor of its own so that the ranks train on their main threads, undisturbed by calls.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

MAX_EVENTS = 10_000
CALL_TIMEOUT_S = 10.0


class RunChannel:
    """An asynchronous actor; every method may be called by any party at any time.

    Args:
        world_size: number of ranks that have to agree.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._events: list[bytes] = []
        self._places: dict[int, int] = {}
        self._arrived, self._stop, self._agreed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def report(self, events: list[bytes]) -> None:
        """Takes events of a rank, pickled: here nobody knows their classes. Where the driver is slow, the oldest are dropped."""
        self._events = [*self._events, *events][-MAX_EVENTS:]
        self._arrived.set()

    async def drain(self, timeout_s: float) -> list[bytes]:
        """All events since the last call, waiting up to `timeout_s` for the first."""
        await _within(timeout_s, self._arrived)
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    async def request_stop(self) -> None:
        """Called by the driver; idempotent."""
        self._stop.set()

    async def stop_wanted(self, timeout_s: float) -> bool:
        """Whether the ranks shall stop, waiting up to `timeout_s` for it."""
        return await _within(timeout_s, self._stop)

    async def agree(self, rank: int, place: int, timeout_s: float) -> int | None:
        """Where all ranks stop: the furthest place that any of them has reached.

        Args:
            rank: who asks.
            place: where this rank is, see `StopGate`. It does not go on before it has the answer.
            timeout_s: longest wait for the other ranks; then None.
        """
        self._places[rank] = place
        if len(self._places) == self._world_size:
            self._agreed.set()
        return max(self._places.values()) if await _within(timeout_s, self._agreed) else None


async def _within(timeout_s: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def start_channel(world_size: int) -> Any:
    """Handle of a new RunChannel.

    Its process gets the class by value: importing this package there would load torch for nothing.
    """
    import ray
    from ray import cloudpickle

    from rl_lightning.strategies.cluster import beside_me

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        actor: Any = ray.remote(RunChannel).options(max_concurrency=1000, **beside_me())
        return actor.remote(world_size)
    finally:
        cloudpickle.unregister_pickle_by_value(here)
