"""WorkerGroup: the trainer's actors, placed together on the cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rl_lightning.strategies.cluster import describe
from rl_lightning.strategies.demand import Demand
from rl_lightning.strategies.environment import Placement, Rank
from rl_lightning.strategies.failures import RayWorkerError
from rl_lightning.strategies.place import Place, in_bundle, in_order, number
from rl_lightning.strategies.worker import TrainWorker

logger = logging.getLogger(__name__)

POLL_S = 0.5
PROGRESS_S = 10.0


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """Size of the group.

    Attributes:
        num_workers: actors, one per rank.
        num_cpus: Ray CPUs of each.
        num_gpus: Ray GPUs of each.
        env: environment variables that must be there before Python starts.
        start_timeout_s: until all are up.
        placement: how nodes are chosen.
        beside: resources that are kept beside each worker, for others.
    """

    num_workers: int
    num_cpus: float
    num_gpus: float
    env: Mapping[str, str]
    start_timeout_s: float
    placement: Placement = "PACK"
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def each(self) -> dict[str, float]:
        """Resources of one worker."""
        return {"CPU": self.num_cpus, **({"GPU": self.num_gpus} if self.num_gpus else {})}

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one place."""
        both = {name: self.each.get(name, 0.0) + self.beside.get(name, 0.0) for name in {**self.each, **self.beside}}
        return {name: amount for name, amount in both.items() if amount}

    @property
    def demand(self) -> Demand:
        """What all workers together ask of the cluster."""
        return Demand("trainer rank", self.num_workers, self.each, "num_workers, num_cpus_per_worker, num_gpus_per_worker")

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in self.each.items())
        return f"{self.num_workers} training worker{'s' * (self.num_workers != 1)} with {each} each"


class WorkerGroup:
    """Has its places on the cluster when the constructor returns, and starts in them; `stop` ends it, at once and always.

    Args:
        settings: its size.
        check: called again and again while waiting; may raise to give up.
        reserved: the places of an earlier attempt of the same size, None for new ones.

    Attributes:
        bundles: the placement group. It outlives `stop`, so that nothing else takes the places between two attempts.
        workers: actor handles by rank.
        places: where they are, by rank. Ranks of one node follow each other, and the driver's node comes first.

    Raises:
        RayWorkerError: not all workers were up in time, or one failed to start; says what the cluster has.
    """

    def __init__(self, settings: GroupSettings, check: Callable[[], None], reserved: PlacementGroup | None = None) -> None:
        self._settings, self._check = settings, check
        self._began_at = self._told_at = time.monotonic()
        self.places: list[Place] = []
        self.bundles = reserved or placement_group([settings.bundle] * settings.num_workers, strategy=settings.placement)
        try:
            self._await_bundles()
        except BaseException:
            remove_placement_group(self.bundles)
            raise
        actor, env = ray.remote(TrainWorker), {"env_vars": dict(settings.env)}
        options = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus, "runtime_env": env}
        places = [in_bundle(self.bundles, i) for i in range(settings.num_workers)]
        self.workers: list[Any] = [actor.options(**options, **place).remote() for place in places]

    def await_workers(self) -> None:
        """Returns when all actors are up."""
        asked = [worker.place.remote() for worker in self.workers]
        while pending := ray.wait(asked, num_returns=len(asked), timeout=POLL_S)[1]:
            self._wait_on("to start", len(pending))
        try:
            places = ray.get(asked)
        except ray.exceptions.RayError as error:
            raise RayWorkerError(f"a training worker did not start: {str(error).strip()}", cause=error) from error
        order = in_order(places, ray.get_runtime_context().get_node_id())
        self.workers, self.places = [self.workers[i] for i in order], [places[i] for i in order]

    def ranks(self, store_timeout_s: float) -> list[Rank]:
        """The ranks, once rank 0 has opened the store that they meet at."""
        port = ray.get(self.workers[0].open_store.remote(len(self.workers), store_timeout_s), timeout=60)
        return number(self.places, port)

    def stop(self) -> None:
        """Kills the actors, and with them the actors that they own. Idempotent."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def _await_bundles(self) -> None:
        while not self.bundles.wait(POLL_S):
            self._wait_on("to be placed", self._settings.num_workers)

    def _wait_on(self, what: str, missing: int) -> None:
        self._check()
        now = time.monotonic()
        if now - self._began_at > self._settings.start_timeout_s:
            raise RayWorkerError(self._complaint(what, missing))
        if now - self._told_at > PROGRESS_S:
            self._told_at = now
            logger.info("waiting for %d of %s %s; cluster %s", missing, self._settings, what, describe())

    def _complaint(self, what: str, missing: int) -> str:
        free, waited_s = ray.available_resources(), time.monotonic() - self._began_at
        return (
            f"{missing} of {self._settings} still wait {what} after {waited_s:.0f} s (start_timeout_s="
            f"{self._settings.start_timeout_s:g}): the cluster is {describe()}, and free are {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs; ask for less (num_workers, num_cpus_per_worker, num_gpus_per_worker), end other "
            f"jobs or add nodes{self._of_placement()}"
        )

    def _of_placement(self) -> str:
        return "" if self._settings.placement == "PACK" else f", or leave placement={self._settings.placement} out"
