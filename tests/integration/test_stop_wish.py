"""The driver's wish to stop reaches a rank whose question was once not answered in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray

from rl_lightning.strategies import worker

pytestmark = pytest.mark.slow


def start_channel() -> Any:
    """Handle of an actor that answers the first question too late, and the second that the ranks shall stop."""

    class SlowOnce:
        asked = 0

        async def stop_wanted(self, timeout_s: float) -> bool:
            self.asked += 1
            if self.asked == 1:
                await asyncio.sleep(600)
            return self.asked > 1

    return ray.remote(SlowOnce).options(num_cpus=0).remote()


class Gate:
    """Notes that it was told."""

    requested = False

    def request(self) -> None:
        self.requested = True


def test_a_late_answer_does_not_end_the_questions(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STOP_POLL_S", 0.1)
    monkeypatch.setattr(worker, "CALL_TIMEOUT_S", 1.0)
    channel, gate, told_late = start_channel(), Gate(), Gate()
    worker._await_stop(channel, gate)  # type: ignore[arg-type]
    assert gate.requested
    ray.kill(channel)
    worker._await_stop(channel, told_late)  # type: ignore[arg-type]
    assert not told_late.requested
