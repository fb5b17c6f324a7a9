"""RolloutWorkerActor: a RolloutWorker in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rl_lightning.engines.engine import EngineError
from rl_lightning.rollout.controller_client import ControllerClient
from rl_lightning.rollout.outbox import Outbox
from rl_lightning.rollout.worker import RolloutWorker, WorkerSettings
from rl_lightning.types import RolloutGroup
from rl_lightning.weights.channel import own_address
from rl_lightning.weights.interface import name_interface
from rl_lightning.weights.transport import WeightTarget, WeightUpdate

if TYPE_CHECKING:
    from rl_lightning.engines.engine import Engine
    from rl_lightning.rewards.pool import RewardPool
    from rl_lightning.rollout.workflow import Workflow

logger = logging.getLogger(__name__)


class RolloutWorkerActor:
    """A RolloutWorker in a process of its own (a Ray actor): its event loop runs in one thread, Ray's calls in others.

    The worker starts in `__init__`, so that an actor that Ray restarted goes on without anybody's help.

    Args:
        settings: of the worker.
        controller: name of the RolloutController's actor.
        engine, workflow: pickled from the driver.
        rewards: what scores the answers, not started yet.
    """

    def __init__(
        self, settings: WorkerSettings, controller: str, engine: Engine, workflow: Workflow, rewards: RewardPool
    ) -> None:
        import threading

        import torch

        torch.set_num_threads(1)
        name_interface(own_address())  # for a server that takes weights by gloo
        if os.path.isdir(settings.folder):
            os.chdir(settings.folder)
        self.settings, self.controller = settings, controller
        self.engine, self.workflow, self.rewards = engine, workflow, rewards
        self.worker: RolloutWorker | None = None
        self.outbox = Outbox()
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="rollout-worker", daemon=True)
        self._thread.start()

    def target(self) -> WeightTarget:
        """How its engine takes weights; meaningful once it was registered."""
        engine = self.engine if self.worker is None else self.worker.engine
        return replace(engine.target, name=self.settings.name)

    def update_weights(self, update: WeightUpdate, timeout_s: float) -> float:
        """See `RolloutWorker.update_weights`; gives up after `timeout_s`."""
        if self.worker is None:
            raise EngineError(f"{self.settings.name}: still starting")
        future = asyncio.run_coroutine_threadsafe(self.worker.update_weights(update), self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise EngineError(
                f"{self.settings.name}: weights of version {update.version} not loaded within {timeout_s:.0f} s"
            ) from None

    def yield_memory(self, timeout_s: float) -> None:
        """See `RolloutWorker.yield_memory`."""
        if self.worker is not None:
            asyncio.run_coroutine_threadsafe(self.worker.yield_memory(), self._loop).result(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the engine and the rewards; returns when their processes are gone."""
        if self._main is not None:
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(_serve(self))
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)

    def fetch(self, key: int) -> tuple[RolloutGroup, bool]:
        """A finished group, and a flag that it arrived. Whoever calls owns the two objects."""
        return self.outbox.fetch(key), True


async def _serve(actor: RolloutWorkerActor) -> None:
    """The actor's whole life. Not a method: a coroutine among its methods would make Ray run all of them on one loop."""
    import ray

    from rl_lightning.prompts.tokenizer import load_tokenizer

    client, name = ControllerClient(ray.get_actor(actor.controller)), actor.settings.name
    try:
        tokenizer = load_tokenizer(actor.settings.model_path)

        def decode(token_ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

        async with actor.rewards as score:
            handle = ray.get_runtime_context().current_actor
            store = actor.outbox.keep
            actor.worker = RolloutWorker(actor.settings, client, actor.engine, actor.workflow, score, decode, store, handle)
            await actor.worker.run()
    except Exception as error:  # nobody awaits this thread: the reason must reach the trainer
        logger.exception("%s failed", name)
        with contextlib.suppress(ray.exceptions.RayActorError):  # the controller itself may be what failed
            await client.fail(f"{name} failed: {type(error).__name__}: {error}")
