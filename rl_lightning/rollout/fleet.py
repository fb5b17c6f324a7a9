"""RolloutFleet: the controller and the workers as Ray actors, and how the trainer speaks to them."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_client import CONTROLLER_POLL_S, CONTROLLER_RESTART_S
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.errors import RolloutError
from rl_lightning.rollout.worker import WorkerSettings
from rl_lightning.rollout.worker_actor import RolloutWorkerActor

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from rl_lightning.engines.engine import Engine
    from rl_lightning.prompts.dataset import PromptDataset
    from rl_lightning.prompts.source import PromptSource
    from rl_lightning.rewards.pool import RewardPool
    from rl_lightning.rollout.workflow import Workflow

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 60.0
STOP_CALL_TIMEOUT_S = 3.0
CHECK_S = 0.5
PROGRESS_S = 30.0

Check = Callable[[], None]
"""Called again and again during a wait; raises to give up."""


class ControllerLostError(RuntimeError):
    """The controller that this trainer began with is gone: Ray starts it again, without its state."""


class RolloutControllerActor(RolloutController):
    """The controller as a Ray actor: it owns finished groups, so that they outlive the worker that made them.

    A trainer speaks to it by `ask`, and names the life that it began with `live`: so a controller that Ray restarted does
    not answer as if nothing had been, and the ranks of an earlier attempt cannot speak in the name of the new one.
    """

    _life = ""

    async def live(self, life: str, state: Mapping[str, Any] | None, *, published: bool) -> None:
        """`begin`, unless it is the life that the controller is in."""
        if life != self._life:
            await self.begin(state, published=published)
            self._life = life

    async def ask(self, life: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result of a method; ControllerLostError in another life."""
        if life != self._life:
            raise ControllerLostError
        return await getattr(self, method)(*args, **kwargs)

    async def _claim(self, worker: str, content: Any) -> list[Any]:
        """Takes ownership of a group in the worker's outbox; its arrays stay in the object store of the worker's node."""
        entry = self._roster.get(worker)
        if entry is None:
            return []
        group, arrived = entry.handle.fetch.options(num_returns=2).remote(content)
        await arrived
        return [group]


@dataclass(frozen=True)
class FleetSettings:
    """Size and resources of the fleet.

    Attributes:
        num_engines: rollout workers, each with one engine.
        min_engines: as many must be ready before the trainer starts; the others join whenever Ray has a place for them.
        cpus_per_engine, gpus_per_engine: Ray resources of one worker.
        start_timeout_s: until the controller's process is up, and from then on until every engine is ready.
    """

    num_engines: int
    min_engines: int
    cpus_per_engine: float
    gpus_per_engine: float
    start_timeout_s: float


@dataclass
class RolloutFleet:
    """Started by the driver of a RayStrategy, else by trainer rank 0; the ranks get copies that reach the same actors.

    Attributes:
        controller: actor handle of the RolloutController.
        settings: see `FleetSettings`.
        workers: actor handles by name, for ending them; only in the process that started them.
        life: names the trainer's attempt to the controller.
        wanted: engines that must be ready before anything is published.
        restores: this copy gives a restarted controller its state back; on rank 0 only.
        state: what it gives.
    """

    controller: Any
    settings: FleetSettings
    workers: dict[str, Any] = field(default_factory=dict)
    life: str = ""
    wanted: int = 0
    restores: bool = False
    state: Mapping[str, Any] | None = None

    @classmethod
    def launch(
        cls,
        settings: FleetSettings,
        controller: ControllerSettings,
        worker: WorkerSettings,
        source: PromptSource,
        validation: PromptDataset | None,
        engine: Engine,
        workflow: Workflow,
        rewards: RewardPool,
        env_vars: Mapping[str, str],
        check: Check = lambda: None,
        places: PlacementGroup | None = None,
    ) -> RolloutFleet:
        """Starts all actors in the cluster that this process is connected to; waits for the controller, not for the engines.

        Workers stand in the bundles of `places`, where there are any; the others wherever Ray has room.
        """
        import ray

        from rl_lightning.strategies.cluster import beside_me
        from rl_lightning.strategies.job import worker_environment
        from rl_lightning.strategies.place import in_bundle

        env = {"env_vars": {**worker_environment(), "TOKENIZERS_PARALLELISM": "false", **env_vars}}
        # Workers find the controller by name: Ray cannot restart actors that got a handle as an argument.
        name = f"rollout-controller-{uuid.uuid4().hex[:8]}"
        options = {"name": name, "runtime_env": env, "max_restarts": -1, **beside_me()}
        handle = ray.remote(RolloutControllerActor).options(**options).remote(source, controller, validation)
        fleet = cls(handle, settings, wanted=settings.min_engines)
        actor, each = ray.remote(RolloutWorkerActor), {"num_cpus": settings.cpus_per_engine, "num_gpus": settings.gpus_per_engine}
        for i in range(settings.num_engines):
            named = replace(worker, name=f"worker {i}")
            placed = actor.options(**each, **in_bundle(places, i), max_restarts=-1, max_concurrency=4, runtime_env=env)
            fleet.workers[named.name] = placed.remote(named, name, engine, workflow, rewards)
        try:
            fleet.begin(check)
        except BaseException:
            fleet.stop()
            raise
        return fleet

    def __getstate__(self) -> dict[str, Any]:
        """A copy can speak to the actors but does not own them."""
        return {**self.__dict__, "workers": {}, "restores": False}

    def begin(self, check: Check = lambda: None) -> None:
        """A trainer starts: what an earlier one left is void; its engines are kept, and register again at once.

        Raises:
            RolloutError: the controller's process was not up within `start_timeout_s`, or died for good.
        """
        if self.life:
            self.wanted = 1  # those that live; the others join when Ray has a place for them
        self.life, self.state = uuid.uuid4().hex, None
        start_s = self.settings.start_timeout_s
        live = self.life, None
        self._until_answered(lambda: self._ask("start", "live", *live, published=False, timeout_s=start_s, check=check))

    def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, **kwargs: Any) -> Any:
        """Result of a controller method; waits for a controller that Ray is starting again.

        Raises:
            RolloutError: what the controller raised, or that it died for good or did not answer in time.
        """
        what = f"answer {method!r}"
        return self._until_answered(lambda: self._ask(what, "ask", self.life, method, *args, timeout_s=timeout_s, **kwargs))

    def _until_answered(self, ask: Callable[[], Any]) -> Any:
        give_up_s = time.monotonic() + CONTROLLER_RESTART_S
        while True:
            try:
                return ask()
            except ControllerLostError:
                if time.monotonic() > give_up_s:
                    raise RolloutError(f"the rollout controller did not come back within {CONTROLLER_RESTART_S:.0f} s") from None
            self._restore()
            time.sleep(CONTROLLER_POLL_S)

    def _restore(self) -> None:
        if not self.restores:
            return
        with contextlib.suppress(ControllerLostError):
            self._ask("go on", "live", self.life, self.state, published=True)
            logger.warning("the rollout controller had died; it goes on from version %d", (self.state or {}).get("version", 0))

    def _ask(
        self, what: str, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, check: Check = lambda: None, **kwargs: Any
    ) -> Any:
        """Result of the actor's own method; `what` the controller is asked to do, for messages."""
        import ray

        answer = getattr(self.controller, method).remote(*args, **kwargs)
        _await(answer, f"the rollout controller to {what}", timeout_s, check)
        try:
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.ActorUnavailableError:
            raise ControllerLostError from None
        except ray.exceptions.RayActorError as error:
            raise RolloutError(f"the rollout controller died: {error}; start again with --ckpt_path last") from error

    def wait_for_workers(self) -> list[tuple[str, Any]]:
        """(name, handle) of all workers, once as many engines are ready as are wanted.

        Raises:
            RolloutError: not all were within `start_timeout_s`; says how many, and what the cluster has.
        """
        import ray

        started, wanted = time.monotonic(), self.wanted
        told = started
        while len(ready := self.call("workers")) < wanted:
            self.call("check")
            now = time.monotonic()
            if now - started > self.settings.start_timeout_s:
                s = self.settings
                raise RolloutError(
                    f"only {len(ready)} of {wanted} engines were ready within {s.start_timeout_s:.0f} s (start_timeout_s); each "
                    f"asks for {s.cpus_per_engine} CPUs and {s.gpus_per_engine} GPUs, free now: {ray.available_resources()}"
                )
            if now - told > PROGRESS_S:
                told = now
                logger.info("waiting for engines: %d of %d ready after %.0f s", len(ready), wanted, now - started)
            time.sleep(0.2)
        return ready

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends engines, rewards and actors; those that do not end in time are killed. Idempotent."""
        import ray

        if not ray.is_initialized():
            return
        asked = [self.workers[name].stop.remote() for name in self._reachable() if name in self.workers]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
        for handle in [*self.workers.values(), *([self.controller] if self.workers else [])]:
            ray.kill(handle)
        self.workers = {}

    def _reachable(self) -> list[str]:
        """Names of the workers that live; the others, which wait for a place, could not answer."""
        if not self.workers:
            return []
        try:
            return [name for name, _ in self._ask("answer", "workers", timeout_s=STOP_CALL_TIMEOUT_S)]
        except (RolloutError, ControllerLostError):
            return []


def _await(answer: Any, what: str, timeout_s: float, check: Check) -> None:
    """Returns when `answer` is there, as a value or an error.

    Raises:
        RolloutError: it was not within `timeout_s`.
    """
    import ray

    started = told = time.monotonic()
    while not ray.wait([answer], timeout=min(CHECK_S, timeout_s))[0]:
        check()
        now = time.monotonic()
        if now - started >= timeout_s:
            raise RolloutError(f"waited {timeout_s:.0f} s for {what}, in vain: its node may be too busy, or cut off")
        if now - told > PROGRESS_S:
            told = now
            logger.info("waiting for %s since %.0f s, at most %.0f s", what, now - started, timeout_s)
