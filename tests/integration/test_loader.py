"""RolloutLoader and answers that do not arrive."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from rl_lightning.rollout.errors import RolloutError
from rl_lightning.rollout.loader import MOST_LOSSES, RolloutLoader, fetch
from rl_lightning.rollout.share import Share
from rl_lightning.rollout.share_wait import ShareWait

NEVER_S = 1000.0


@pytest.fixture
def never(ray_cluster: str) -> Any:
    """A reference to what takes for ever, as what lies on a node does whose death Ray has not noticed."""
    reference = ray.remote(num_cpus=0)(lambda: time.sleep(NEVER_S)).remote()
    yield reference
    ray.cancel(reference, force=True)


def test_what_does_not_arrive_in_time_counts_as_lost_and_the_rest_is_kept(never: Any) -> None:
    share = Share(0, ([ray.put("first")], [never], [ray.put("last")]))
    assert fetch(share, 2.0) == (["first", "last"], [1])


def test_what_never_arrives_is_not_asked_for_for_ever(never: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fleet:
        state = None

        def __init__(self) -> None:
            self.lost: list[Any] = []

        def call(self, method: str, *args: Any) -> Share | None:
            if method == "lost":
                self.lost.append(args)
                return None
            return Share(0, ([never],))

    fleet: Any = Fleet()
    monkeypatch.setattr("rl_lightning.rollout.loader.fetch", lambda share: fetch(share, 0.1))
    loader = RolloutLoader(fleet, lambda: 0, 1, rank=0, world_size=1, wait=ShareWait(60))
    with pytest.raises(RolloutError, match="answers for step 1 were generated and did not arrive"):
        next(iter(loader))
    assert fleet.lost == [(0, 0, [0])] * MOST_LOSSES
