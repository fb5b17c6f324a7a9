"""RolloutWorker: keeps one engine alive and busy with leased prompt groups.

Three coroutines side by side, until `stop`:

| loop | consumes | waits for | produces |
|---|---|---|---|
| serve | leases | the controller, then the engine and the rewards of each lease | finished groups, put to the controller |
| heartbeat | the worker's counters | one second | signs of life; cancels leases that were revoked |
| supervise | engine failures | the engine's death | a restarted engine, registered again without proven weights |

A lease ends in exactly one of `put` and `give_back`, whatever happens to the engine; should the whole process die, the
controller gives its leases to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rl_lightning.engines.engine import EngineError, YieldsMemory
from rl_lightning.rollout.controller import GroupFilterError, GroupRecord
from rl_lightning.types import Lease, RolloutGroup
from rl_lightning.weights.transport import WeightTarget, WeightUpdate

if TYPE_CHECKING:
    from rl_lightning.engines.engine import Engine
    from rl_lightning.rewards.pool import RewardPool
    from rl_lightning.rollout.workflow import Scorer, Workflow

logger = logging.getLogger(__name__)

CONTROLLER_RESTART_S = 300.0
CONTROLLER_POLL_S = 0.5

GroupFilter = Callable[[RolloutGroup], bool]
"""Whether a group may be trained on."""


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker runs; times in seconds.

    Attributes:
        name: stable over restarts; appears in logs.
        model_path: what the engine loads.
        room: most groups in flight here.
        max_engine_restarts: engine failures in a row, without a group finished in between, before the run is stopped.
        heartbeat_s: between signs of life.
        group_filter: asked about every training group; None lets all pass.
        folder: what relative paths are relative to; left alone where it does not exist.
    """

    name: str
    model_path: str
    room: int
    max_engine_restarts: int = 3
    heartbeat_s: float = 1.0
    group_filter: GroupFilter | None = None
    folder: str = "."


class RolloutWorker:
    """See the module's table.

    Args:
        settings: see `WorkerSettings`.
        controller: has the controller's methods as coroutines.
        engine: not started yet.
        workflow: turns a lease into a group.
        score: the rewards.
        decode: token ids to text.
        store: keeps a group and returns what the controller claims it by.
        handle: how the trainer reaches this worker.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        controller: Any,
        engine: Engine,
        workflow: Workflow,
        score: Scorer,
        decode: Callable[[Sequence[int]], str],
        store: Callable[[RolloutGroup], Any] = lambda group: group,
        handle: Any = None,
    ) -> None:
        self.settings, self.controller, self.engine = settings, controller, engine
        self._workflow, self._score, self._decode, self._store, self._handle = workflow, score, decode, store, handle
        self._incarnation = ""
        self._leases: dict[int, tuple[Lease, asyncio.Task[None]]] = {}
        self._failure: asyncio.Future[None] | None = None
        self._failures_in_a_row = 0
        self._born_s = self._mark_s = time.monotonic()
        self._busy_s = 0.0

    async def run(self) -> None:
        """Serves until cancelled, restarting the engine when it fails; returns if it fails too often."""
        heartbeat = asyncio.create_task(self._heartbeat())
        try:
            while self._failures_in_a_row <= self.settings.max_engine_restarts:
                try:
                    await self._start_and_serve()
                except EngineError as error:
                    self._failures_in_a_row += 1
                    last = error
                    await self.controller.leave(self.settings.name, f"failure {self._failures_in_a_row} in a row: {error}")
                finally:
                    await self._cancel_leases()
                    await self.engine.stop()
            await self.controller.fail(
                f"{self.settings.name} gave up: its engine failed {self._failures_in_a_row} times in a row; the last time: {last}"
            )
        finally:
            heartbeat.cancel()

    async def update_weights(self, update: WeightUpdate) -> float:
        """Hands `update` to the engine; returns the seconds that generation stood still.

        Raises:
            EngineError: the engine is not up, or failed now and will be restarted.
            WeightMismatchError: from the engine.
        """
        if self._failure is None:
            raise EngineError(f"{self.settings.name}: the engine is not up yet")
        try:
            return await self.engine.update_weights(update)
        except EngineError as error:
            self._engine_failed(error)
            raise

    async def yield_memory(self) -> None:
        """Has an engine that can let go of its memory until the next update; see `YieldsMemory`."""
        if self._failure is None or not isinstance(self.engine, YieldsMemory):
            return
        try:
            await self.engine.yield_memory()
        except EngineError as error:
            self._engine_failed(error)

    # -- serving

    async def _start_and_serve(self) -> None:
        await self.engine.start(self.settings.model_path)
        self._failure = asyncio.get_running_loop().create_future()
        self._incarnation = uuid.uuid4().hex
        await self._register()
        loops = [asyncio.create_task(self._serve()), asyncio.create_task(self._supervise())]
        try:
            await asyncio.wait([*loops, self._failure], return_when=asyncio.FIRST_COMPLETED)
            for loop in loops:
                if loop.done():
                    loop.result()
            self._failure.result()
        finally:
            self._failure = None
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def _register(self) -> None:
        await self.controller.register(self.settings.name, self._incarnation, self._handle)

    async def _serve(self) -> None:
        """Asks for as many groups as there is room for, and starts them."""
        while True:
            room = self.settings.room - len(self._leases)
            if room <= 0:
                await asyncio.wait([task for _, task in self._leases.values()], return_when=asyncio.FIRST_COMPLETED)
                continue
            for lease in await self.controller.lease(self.settings.name, room):
                self._account()
                self._start_answer(lease)

    def _start_answer(self, lease: Lease) -> None:
        key = self._key(lease)
        task = asyncio.create_task(self._answer(lease))
        self._leases[key] = (lease, task)
        task.add_done_callback(lambda _: self._forget(key))

    async def _answer(self, lease: Lease) -> None:
        started_s = time.monotonic()
        try:
            group = await self._workflow.run(lease, self.engine, self._score, self._decode)
            group = RolloutGroup(group.index, group.prompt, group.rollouts, self.settings.name, time.monotonic() - started_s)
            record = self._record(group, passes_filter=lease.evaluation or self._passes_filter(group))
            await self.controller.put(self.settings.name, lease, record, self._store(group))
        except EngineError as error:
            self._engine_failed(error)
            await self.controller.give_back(self.settings.name, lease, str(error), counts=False)
        except GroupFilterError as error:
            logger.exception("prompt group %d could not be filtered", lease.index)
            await self.controller.fail(str(error), GroupFilterError)
            await self.controller.give_back(self.settings.name, lease, str(error), counts=True)
        except Exception as error:  # a user's workflow may raise anything: the group is counted and tried again
            logger.exception("prompt group %d could not be answered", lease.index)
            await self.controller.give_back(self.settings.name, lease, f"{type(error).__name__}: {error}", counts=True)
        else:
            self._failures_in_a_row = 0

    async def _supervise(self) -> None:
        """Asks the engine for its health, so that a death is noticed with nothing in flight too."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            await self.engine.health()

    async def _cancel_leases(self) -> None:
        """Stops work on what is in flight; the controller has given it to others, or will when this worker is gone."""
        tasks = [task for _, task in self._leases.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _engine_failed(self, error: EngineError) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    # -- reporting

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            self._account()
            if not self._incarnation:
                continue
            report = {"busy_s": self._busy_s, "alive_s": time.monotonic() - self._born_s, "tokens": self._tokens_in_flight()}
            revoked = await self.controller.heartbeat(self.settings.name, self._incarnation, report)
            if revoked is None and self._failure is not None:
                await self._cancel_leases()
                self._incarnation = uuid.uuid4().hex
                await self._register()
            for submission in revoked or ():
                if (entry := self._leases.get(submission)) is not None:
                    entry[1].cancel()

    def _account(self) -> None:
        """Adds the time since the last call to the busy time, if anything was in flight."""
        now = time.monotonic()
        if self._leases:
            self._busy_s += now - self._mark_s
        self._mark_s = now

    def _forget(self, key: int) -> None:
        self._account()
        self._leases.pop(key, None)

    def _tokens_in_flight(self) -> float:
        return float(sum(len(lease.prompt.token_ids) * lease.group_size for lease, _ in self._leases.values()))

    @staticmethod
    def _key(lease: Lease) -> int:
        """Submissions of training are counted from 0, those of evaluation from 1: keys keep them apart."""
        return -lease.submission if lease.evaluation else lease.submission

    def _passes_filter(self, group: RolloutGroup) -> bool:
        group_filter = self.settings.group_filter
        try:
            return group_filter is None or bool(group_filter(group))
        except Exception as error:  # a user's predicate may raise anything, and would again
            name = getattr(group_filter, "__qualname__", type(group_filter).__qualname__)
            raise GroupFilterError(
                f"data.group_filter {name} raised {type(error).__name__}: {error} on prompt group {group.index} "
                f"({group.prompt.query_id}); mend it, or set group_filter to null"
            ) from error

    @staticmethod
    def _record(group: RolloutGroup, *, passes_filter: bool) -> GroupRecord:
        answers = group.rollouts
        return GroupRecord(
            n_tokens=group.n_tokens,
            n_answer_tokens=sum(len(r.completion) for r in answers),
            success_rate=sum(r.reward > 0 for r in answers) / len(answers),
            failures=Counter(r.reward_failure for r in answers if r.reward_failure),
            passes_filter=passes_filter,
        )


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
        if os.path.isdir(settings.folder):
            os.chdir(settings.folder)
        self.settings, self.controller = settings, controller
        self.engine, self.workflow, self.rewards = engine, workflow, rewards
        self.worker: RolloutWorker | None = None
        self._outbox: dict[int, RolloutGroup] = {}
        self._keys = itertools.count()
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
        """A finished group, once, and a flag that it arrived. Whoever calls owns the two objects."""
        return self._outbox.pop(key), True

    def keep(self, group: RolloutGroup) -> int:
        """Holds a finished group until it is fetched; returns the key to it."""
        self._outbox[key := next(self._keys)] = group
        return key


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
            actor.worker = RolloutWorker(actor.settings, client, actor.engine, actor.workflow, score, decode, actor.keep, handle)
            await actor.worker.run()
    except Exception as error:  # nobody awaits this thread: the reason must reach the trainer
        logger.exception("%s failed", name)
        with contextlib.suppress(ray.exceptions.RayActorError):  # the controller itself may be what failed
            await client.fail(f"{name} failed: {type(error).__name__}: {error}")
