"""Loaders: batches as the trainer's rank sees them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rl_lightning.batching.collate import collate
from rl_lightning.rollout.errors import RolloutError
from rl_lightning.rollout.share import Share
from rl_lightning.rollout.share_wait import ShareWait
from rl_lightning.types import Batch, RolloutGroup

if TYPE_CHECKING:
    from rl_lightning.rollout.fleet import RolloutFleet

POLL_S = 5.0
FETCH_TIMEOUT_S = 60.0
MOST_LOSSES = 5
"""Fetches of one batch, one after the other, that may miss answers: nodes die one by one, a network that is cut stays cut."""


def fetch(share: Share, timeout_s: float = FETCH_TIMEOUT_S) -> tuple[list[RolloutGroup], list[int]]:
    """(the groups behind a share's references, places of those that went down with their node).

    A node's death may take Ray minutes to notice: what has not arrived within `timeout_s` counts as lost too.
    """
    import ray

    refs = [ref for (ref,) in share.contents]
    arrived, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
    with contextlib.suppress(ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
        if len(arrived) == len(refs):
            return ray.get(refs, timeout=timeout_s), []
    groups, lost, is_here = [], [], set(arrived)
    for place, ref in enumerate(refs):
        try:
            groups.append(ray.get(ref, timeout=timeout_s if ref in is_here else 0))
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
            lost.append(place)
    return groups, lost


def cut_off(what: str) -> RolloutError:
    """Of answers that were generated and never arrive."""
    return RolloutError(
        f"answers for {what} were generated and did not arrive, {MOST_LOSSES} times in a row: can this node reach those of the "
        f"engines on all ports (firewall, ray status)?"
    )


class RolloutLoader:
    """One rank's batches of one epoch. It has a length, so Lightning fetches none ahead: at eta = 0 that would deadlock.

    Args:
        fleet: where batches come from.
        step: the trainer's finished steps, asked before every batch.
        length: steps of an epoch.
        rank, world_size: of data parallelism.
        wait: for each batch.
    """

    def __init__(
        self,
        fleet: RolloutFleet,
        step: Callable[[], int],
        length: int,
        rank: int,
        world_size: int,
        wait: ShareWait,
    ) -> None:
        self._fleet, self._step, self._length = fleet, step, length
        self._rank, self._world_size, self._wait = rank, world_size, wait

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._length):
            yield self._next()

    def _next(self) -> Batch:
        version, started = self._step(), time.monotonic()
        for _ in range(MOST_LOSSES):
            groups, lost = fetch(self._take(version))
            if not lost:
                return replace(collate(groups), version=version, wait_s=time.monotonic() - started)
            self._wait.check_lost(lost)
            self._fleet.call("lost", version, self._rank, lost)
        raise cut_off(f"step {version + 1}")

    def _take(self, version: int) -> Share:
        share = self._wait.until(
            lambda: self._fleet.call("take", version, self._rank, self._world_size, POLL_S), f"batch for step {version + 1}"
        )
        self._fleet.state = share.state
        return share

    def state_dict(self) -> dict[str, int]:
        """Nothing to keep: the controller knows the prompts, and Lightning how many steps an epoch has left."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to restore."""


class EvaluationLoader:
    """One rank's share of the validation set, answered by the engines and given as a single batch.

    Args: as for `RolloutLoader`; `n_prompts` is the size of the whole set.
    """

    def __init__(
        self,
        fleet: RolloutFleet,
        step: Callable[[], int],
        n_prompts: int,
        rank: int,
        world_size: int,
        wait: ShareWait,
    ) -> None:
        self._fleet, self._step, self._positions = fleet, step, list(range(rank, n_prompts, world_size))
        self._wait = wait

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        started = time.monotonic()
        answered: dict[int, RolloutGroup] = {}
        for _ in range(MOST_LOSSES):
            missing = [position for position in self._positions if position not in answered]
            groups, lost = fetch(self._answers(missing))
            there = [position for place, position in enumerate(missing) if place not in lost]
            answered.update(zip(there, groups, strict=True))
            if not lost:
                batch = collate([answered[position] for position in self._positions])
                yield replace(batch, version=self._step(), wait_s=time.monotonic() - started)
                return
            self._wait.check_lost(lost)
        raise cut_off("the validation")

    def _answers(self, positions: list[int]) -> Share:
        evaluation = self._fleet.call("begin_evaluation", positions)
        return self._wait.until(
            lambda: self._fleet.call("take_evaluation", evaluation, POLL_S), f"validation of {len(positions)} prompts"
        )
