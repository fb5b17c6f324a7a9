"""ControllerClient: how a worker speaks to the controller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

CONTROLLER_RESTART_S = 300.0
"""Longest time in which Ray starts a controller again that died."""

CONTROLLER_POLL_S = 0.5


class ControllerClient:
    """The controller's methods as coroutines, over its Ray actor handle.

    A call that finds the controller's process dead waits until Ray has started it again; all of them may come twice.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Any]:
        import ray

        remote = getattr(self._handle, method).remote

        async def call(*args: Any, **kwargs: Any) -> Any:
            give_up_s = time.monotonic() + CONTROLLER_RESTART_S
            while True:
                try:
                    return await remote(*args, **kwargs)
                except ray.exceptions.ActorUnavailableError:
                    if time.monotonic() > give_up_s:
                        raise
                await asyncio.sleep(CONTROLLER_POLL_S)

        return call
