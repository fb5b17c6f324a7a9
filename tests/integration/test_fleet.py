"""RolloutFleet and a controller whose process takes long to start, or never does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray

from rl_lightning.rollout.controller import RolloutError
from rl_lightning.rollout.fleet import FleetSettings, RolloutFleet

NEVER_S = 1000.0


def fleet(start_s: float, start_timeout_s: float) -> RolloutFleet:
    """One whose controller begins a life only after a while."""

    class SlowController:
        async def live(self, life: str, state: Any, *, published: bool) -> None:
            await asyncio.sleep(start_s)

        async def ask(self, life: str, method: str) -> str:
            return method

    handle = ray.remote(num_cpus=0)(SlowController).remote()
    ray.get(handle.ask.remote("", ""), timeout=120)
    return RolloutFleet(handle, FleetSettings(1, 1, 1.0, 0.0, start_timeout_s))


def test_a_controller_may_take_a_while(ray_cluster: str) -> None:
    slow = fleet(start_s=2.0, start_timeout_s=120.0)
    slow.begin()
    assert slow.call("statistics") == "statistics"


def test_one_that_never_starts_is_told_as_that(ray_cluster: str) -> None:
    with pytest.raises(RolloutError, match="waited 1 s for the rollout controller to start, in vain"):
        fleet(NEVER_S, start_timeout_s=1.0).begin()


def test_whoever_waits_for_it_may_give_up(ray_cluster: str) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet(NEVER_S, start_timeout_s=NEVER_S).begin(check)
