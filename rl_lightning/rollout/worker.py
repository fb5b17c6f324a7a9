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
import itertools
import logging
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl_lightning.engines.engine import EngineError, UpdateGivenUpError, YieldsMemory
from rl_lightning.rollout.errors import GroupFilterError
from rl_lightning.rollout.group_filter import GroupFilter, passes
from rl_lightning.rollout.group_record import GroupRecord
from rl_lightning.types import Lease, RolloutGroup
from rl_lightning.weights.transport import WeightUpdate

if TYPE_CHECKING:
    from rl_lightning.engines.engine import Engine
    from rl_lightning.rollout.workflow import Scorer, Workflow

logger = logging.getLogger(__name__)


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
        store: keeps a group while the controller is told of it, and gives what it claims it by.
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
        store: Callable[[RolloutGroup], AbstractContextManager[Any]] = nullcontext,
        handle: Any = None,
    ) -> None:
        self.settings, self.controller, self.engine = settings, controller, engine
        self._workflow, self._score, self._decode, self._store, self._handle = workflow, score, decode, store, handle
        self._incarnation = ""
        self._leases: dict[int, tuple[Lease, asyncio.Task[None]]] = {}
        self._failure: asyncio.Future[None] | None = None
        self._failures_in_a_row = 0
        self._requests = itertools.count()
        self._told: set[tuple[str, int | None]] = set()
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
            UpdateGivenUpError: others gave up, and nothing was changed.
            EngineError: the engine is not up, or failed now and will be restarted.
            WeightMismatchError: from the engine.
        """
        if (began_with := self._failure) is None:
            raise EngineError(f"{self.settings.name}: the engine is not up yet")
        try:
            return await self.engine.update_weights(update)
        except UpdateGivenUpError:
            raise
        except (EngineError, asyncio.CancelledError) as error:
            given_up = EngineError(f"the update to version {update.version} was given up before it was done")
            if self._failure is began_with:  # else the engine has been restarted meanwhile
                self._engine_failed(error if isinstance(error, EngineError) else given_up)
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
            for lease in await self.controller.lease(self.settings.name, room, next(self._requests)):
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
            wanted = lease.evaluation or passes(self.settings.group_filter, group)
            record = GroupRecord.of(group, group_size=lease.group_size, passes_filter=wanted)
            with self._store(group) as content:
                await self.controller.put(self.settings.name, lease, record, content)
        except EngineError as error:
            self._engine_failed(error)
            await self.controller.give_back(self.settings.name, lease, str(error), counts=False)
        except GroupFilterError as error:
            logger.exception("prompt group %d could not be filtered", lease.index)
            await self.controller.fail(str(error), GroupFilterError)
            await self.controller.give_back(self.settings.name, lease, str(error), counts=True)
        except Exception as error:  # a user's workflow may raise anything: the group is counted and tried again
            self._tell(error, lease)
            await self.controller.give_back(self.settings.name, lease, f"{type(error).__name__}: {error}", counts=True)
        else:
            self._failures_in_a_row = 0

    def _tell(self, error: Exception, lease: Lease) -> None:
        """With the traceback where none of that place was shown; why a group came back is told by the controller each time."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        if (place.filename, place.lineno) not in self._told:
            self._told.add((place.filename, place.lineno))
            logger.error("prompt group %d could not be answered", lease.index, exc_info=error)

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
