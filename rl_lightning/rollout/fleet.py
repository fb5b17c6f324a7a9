"""RolloutFleet: the controller and the workers as Ray actors, and how the trainer speaks to them."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rl_lightning.rollout.controller import ControllerSettings, RolloutController, RolloutError
from rl_lightning.rollout.worker import RolloutWorkerActor, WorkerSettings

if TYPE_CHECKING:
    from rl_lightning.engines.engine import Engine
    from rl_lightning.prompts.dataset import PromptDataset
    from rl_lightning.prompts.source import PromptSource
    from rl_lightning.rewards.pool import RewardPool
    from rl_lightning.rollout.workflow import Workflow

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 60.0
PROGRESS_S = 30.0


class RolloutControllerActor(RolloutController):
    """The controller as a Ray actor: it owns finished groups, so that they outlive the worker that made them."""

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
        cpus_per_engine, gpus_per_engine: Ray resources of one worker.
        start_timeout_s: until every engine is ready.
    """

    num_engines: int
    cpus_per_engine: float
    gpus_per_engine: float
    start_timeout_s: float


@dataclass
class RolloutFleet:
    """Started by trainer rank 0; the other ranks get a copy that reaches the same actors.

    Attributes:
        controller: actor handle of the RolloutController.
        settings: see `FleetSettings`.
        workers: actor handles by name, for ending them; only on the rank that started them.
    """

    controller: Any
    settings: FleetSettings
    workers: dict[str, Any] = field(default_factory=dict)

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
    ) -> RolloutFleet:
        """Starts all actors in the cluster that this process is connected to; does not wait for the engines."""
        import ray

        env = {"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}
        # Workers find the controller by name: Ray cannot restart actors that got a handle as an argument.
        name = f"rollout-controller-{uuid.uuid4().hex[:8]}"
        options = {"name": name, "num_cpus": 0, "runtime_env": env}
        handle = ray.remote(RolloutControllerActor).options(**options).remote(source, controller, validation)
        fleet = cls(handle, settings)
        actor = ray.remote(RolloutWorkerActor).options(
            num_cpus=settings.cpus_per_engine,
            num_gpus=settings.gpus_per_engine,
            max_restarts=-1,
            max_concurrency=4,
            runtime_env=env,
        )
        for i in range(settings.num_engines):
            named = replace(worker, name=f"worker {i}")
            fleet.workers[named.name] = actor.remote(named, name, engine, workflow, rewards)
        return fleet

    def __getstate__(self) -> dict[str, Any]:
        """A copy can speak to the actors but does not own them."""
        return {"controller": self.controller, "settings": self.settings, "workers": {}}

    def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, **kwargs: Any) -> Any:
        """Result of a controller method.

        Raises:
            RolloutError: what the controller raised, or that it died or did not answer in time.
        """
        import ray

        try:
            return ray.get(getattr(self.controller, method).remote(*args, **kwargs), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.GetTimeoutError:
            raise RolloutError(f"the rollout controller did not answer {method!r} within {timeout_s:.0f} s") from None
        except ray.exceptions.RayActorError as error:
            raise RolloutError(f"the rollout controller died: {error}; start again with --ckpt_path last") from error

    def wait_for_workers(self) -> list[tuple[str, Any]]:
        """(name, handle) of all workers, once every engine is ready.

        Raises:
            RolloutError: not all were within `start_timeout_s`; says how many, and what the cluster has.
        """
        import ray

        started, wanted = time.monotonic(), self.settings.num_engines
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
        asked = [handle.stop.remote() for handle in self.workers.values()]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
        for handle in [*self.workers.values(), *([self.controller] if self.workers else [])]:
            ray.kill(handle)
        self.workers = {}
