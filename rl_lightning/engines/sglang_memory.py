"""ServerMemory: what an SGLang server beside a trainer lets go of while the trainer works, and takes again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_lightning.engines.sglang_client import SGLangClient
    from rl_lightning.engines.sglang_pause import Pause


class ServerMemory:
    """Of weights, keys and values. Belongs to one start of an engine; callers put a deadline around.

    Args:
        client: of the server.
        pause: ends the server's requests.

    Attributes:
        asleep: the server has let go of it.
    """

    def __init__(self, client: SGLangClient, pause: Pause) -> None:
        self.asleep = False
        self._client, self._pause = client, pause
        self._one_at_a_time = asyncio.Lock()

    async def release(self) -> None:
        """Lets go of it, and of all requests before that. Idempotent, also for several trainer ranks that ask at once."""
        async with self._one_at_a_time:  # a server that is told twice reads weights that it has let go of
            if self.asleep:
                return
            await self._pause.end_requests()
            await self._client.flush()  # succeeds once nothing runs, which the server insists on
            await self._client.release_memory()
            self.asleep = True

    @asynccontextmanager
    async def resumed(self) -> AsyncIterator[None]:
        """Memory for weights before the block, and for the rest after: what the weights come from may take as much."""
        if not self.asleep:
            yield
            return
        await self._client.resume_memory("weights")
        yield
        await self._client.resume_memory("kv_cache", "cuda_graph")
        self.asleep = False
