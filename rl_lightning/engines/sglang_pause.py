"""Pause: an SGLang server samples nothing while its weights are replaced, and loses none of its requests by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from rl_lightning.engines.engine import EngineError
from rl_lightning.engines.sglang_hold import can_hold

if TYPE_CHECKING:
    from rl_lightning.engines.gate import GenerationGate
    from rl_lightning.engines.in_flight import InFlight
    from rl_lightning.engines.sglang_client import SGLangClient

ABORT_EVERY_S = 0.05
HOLD_EVERY_S = 0.002
GIVE_UP_S = 5.0


class Pause:
    """Holds a server with its requests inside, or ends them where it cannot be held. Belongs to one start of an engine.

    No call but `give_up` has a deadline of its own: callers put one around.

    Args:
        client: of the server.
        gate: what every segment passes on its way to the server; closed here, and opened again by the engine.
        flight: what the server was sent and has not answered.

    Attributes:
        holds: whether the server can be held.
    """

    def __init__(self, client: SGLangClient, gate: GenerationGate, flight: InFlight) -> None:
        self.holds = False
        self._client, self._gate, self._flight = client, gate, flight

    async def prepare(self, info: Mapping[str, Any]) -> None:
        """Finds out whether a server with the settings `info` can be held, and leaves it running."""
        self.holds = can_hold(info) and await self._client.hold([]) is not None
        await self._client.go_on()  # also where an engine before this one left the server standing still

    @asynccontextmanager
    async def interrupted(self, version: int, *, asleep: bool, cache: str | None = None) -> AsyncIterator[None]:
        """Nothing is sampled within the block, and what the server keeps is sampled under `version` after it.

        Args:
            version: of the weights that the block brings.
            asleep: the server has let go of its memory, and of its requests before that.
            cache: name of the cache for requests that do not run yet; those that run keep their keys and values. None: the
                cache is emptied, and they are computed again.
        """
        if self.holds and not asleep:
            self._gate.close()
            counts = await self._hold(cache)
            yield
            self._flight.change(version, counts)
            await self._client.go_on()
        else:
            await self.end_requests()
            yield
            await self._client.flush()

    async def end_requests(self) -> None:
        """Closes the gate and ends every segment inside. A request that was still on its way is caught by a later abort."""
        self._gate.close()
        await self._client.abort()
        while not await self._gate.empty(ABORT_EVERY_S):
            await self._client.abort()

    async def give_up(self) -> None:
        """Gets requests back from a server that stands still: they will hear from the gate why."""
        if self.holds:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(GIVE_UP_S):
                    await self._client.refuse_requests()  # those that run would end with their next token only
                    await self._client.abort()

    async def _hold(self, cache: str | None) -> dict[str, int]:
        """Lets the server stand still; how many tokens each request in flight has.

        Asked again while one is neither in the server nor answered: it is on its way in or out.
        """
        while True:
            counts = await self._client.hold(self._flight.rids, cache)
            if counts is None:
                url = self._client.url
                raise EngineError(f"SGLang at {url} cannot be held any more: it was started anew by something else")
            if counts.keys() >= set(self._flight.rids):
                await self._client.refuse_requests(keep=cache is not None)
                return counts
            await asyncio.sleep(HOLD_EVERY_S)
