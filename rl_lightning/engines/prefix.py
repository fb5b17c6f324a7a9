"""PrefixSharing: a prompt that several answers start from is computed once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

MIN_TOKENS = 8
"""Shorter prompts are not worth a request of their own."""

Prompt = tuple[int, ...]


class PrefixSharing:
    """Lets the first of several answers to one prompt fill the server's prefix cache while the others wait for it.

    A server that gets them all in one batch finds nothing in its cache for any of them, and computes the same prompt as
    often as there are answers.

    Args:
        prefill: has the server compute a prompt and keep it.
    """

    def __init__(self, prefill: Callable[[Sequence[int]], Awaitable[None]]) -> None:
        self._prefill = prefill
        self._sharers: Counter[Prompt] = Counter()
        self._filled: dict[Prompt, tuple[int, asyncio.Task[None]]] = {}

    @asynccontextmanager
    async def sharing(self, prompt: Prompt) -> AsyncIterator[None]:
        """One answer to `prompt` is wanted from here to the end of the block."""
        self._sharers[prompt] += 1
        try:
            await asyncio.sleep(0)  # lets those that start at the same moment be counted
            yield
        finally:
            self._sharers[prompt] -= 1
            if not self._sharers[prompt]:
                del self._sharers[prompt]
                self._filled.pop(prompt, None)

    async def cached(self, prompt: Prompt, version: int) -> None:
        """Returns when the server has `prompt` in its cache under `version`, or at once where nobody else wants it."""
        if self._sharers[prompt] < 2 or len(prompt) < MIN_TOKENS:
            return
        filled = self._filled.get(prompt)
        if filled is None or filled[0] != version:
            filled = self._filled[prompt] = (version, asyncio.ensure_future(self._fill(prompt)))
            filled[1].add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, should all waiters be gone
        await asyncio.shield(filled[1])  # one that is cancelled must not end it for the others

    async def _fill(self, prompt: Prompt) -> None:
        await self._prefill(prompt)
