"""RolloutController: admits prompt groups, leases them to workers, hands finished ones to the trainer.

| caller | method | may wait | woken by |
|---|---|---|---|
| worker, when it has room | `lease` | up to `poll_s` | a finished step, a returned or rejected group |
| worker, when a group is done | `put`, `give_back` | never | |
| worker, every second | `heartbeat` | never | |
| worker, when its engine is up or fails | `register`, `leave` | never | |
| trainer rank 0, when it starts or the controller did | `begin` | never | |
| trainer rank, each step | `take`, `lost` | up to `wait_s` | the group that completes a batch |
| trainer rank 0, after each step | `publish` | never | |
| trainer rank, validating | `begin_evaluation`, `take_evaluation` | up to `wait_s` | an answered prompt |

One asyncio process (a Ray actor in a run, a plain object in tests).  It moves records and references, never arrays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rl_lightning.rollout.batch_shares import BatchShares
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.dispatcher import LeaseDispatcher
from rl_lightning.rollout.errors import RolloutError, StepLostError
from rl_lightning.rollout.evaluation import EvaluationQueue
from rl_lightning.rollout.group_record import GroupRecord
from rl_lightning.rollout.ledger import RolloutLedger
from rl_lightning.rollout.roster import WorkerRoster
from rl_lightning.rollout.selection import GroupSelection
from rl_lightning.rollout.share import Share, Waiting
from rl_lightning.types import Lease

if TYPE_CHECKING:
    from rl_lightning.prompts.dataset import PromptDataset
    from rl_lightning.prompts.source import PromptSource

logger = logging.getLogger(__name__)


class RolloutController:
    """See the module's table. All methods are coroutines so that Ray runs them on one event loop, in turn.

    Args:
        source: prompts by index.
        settings: see `ControllerSettings`.
        validation: prompts by position for evaluation, or None.
        clock: seconds that only grow; a test's own where time matters.
    """

    def __init__(
        self,
        source: PromptSource,
        settings: ControllerSettings,
        validation: PromptDataset | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._validation, self._settings, self._clock = source, validation, settings, clock
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._clear(first_submission=0)

    def _clear(self, first_submission: int) -> None:
        """Everything as at the start, but for the counters."""
        s = self._settings
        self._ledger = RolloutLedger(s.gate, s.n_groups, first_submission=first_submission)
        self._roster = WorkerRoster(s.worker_timeout_s, s.policy)
        self._evaluations = EvaluationQueue()
        parties = (self._ledger, self._evaluations, self._roster)
        self._dispatcher = LeaseDispatcher(self._source, self._validation, s, *parties)
        self._selection = GroupSelection(s.success_rate_lb, s.success_rate_ub, s.max_rejections, s.gate.batch_size)
        self._shares = BatchShares(self._ledger)
        self._revoked: defaultdict[str, list[int]] = defaultdict(list)
        self._published = False
        self._fatal: Exception | None = None
        self._nothing_expires_before_s = self._clock()

    # -- workers

    async def register(self, worker: str, incarnation: str, handle: Any) -> None:
        """A worker is ready to generate. Whatever it held before is leased again."""
        self._drop_leases(worker)
        self._roster.register(worker, incarnation, handle, self._clock())
        await self._notify()

    async def leave(self, worker: str, reason: str) -> None:
        """The worker's engine failed: its groups go to others at once, and it gets no weights until it registers again."""
        logger.warning("%s is out until its engine has restarted: %s", worker, reason)
        self._drop_leases(worker)
        self._roster.remove(worker)
        await self._notify()

    async def heartbeat(self, worker: str, incarnation: str, report: Mapping[str, float]) -> list[int] | None:
        """Notes a sign of life; returns submissions to cancel, or None if the worker must register again."""
        if not self._roster.heartbeat(worker, incarnation, report, self._clock()):
            return None
        self._expire()
        return self._revoked.pop(worker, [])

    async def lease(self, worker: str, room: int, request: int | None = None, poll_s: float = 10.0) -> list[Lease]:
        """Up to `room` groups for `worker`, as soon as there is one; empty after `poll_s`.

        The same `request` again has the same answer: a call whose answer the network lost costs no lease.
        """
        leases = self._dispatcher.ask(worker, room, request)
        self._dispatch()
        await asyncio.wait([leases], timeout=poll_s)
        self._dispatcher.withdraw(worker, leases)
        return leases.result() if leases.done() else []

    async def put(self, worker: str, lease: Lease, record: GroupRecord, content: Any) -> bool:
        """A group is answered.

        False, and nothing happens, if the worker does not hold the lease any more: another one was given it, or this is the
        same call again, whose answer the network lost.
        """
        if self._roster.get(worker) is None:
            return False  # it held nothing since it was lost, or since the trainer began anew
        content = await self._claim(worker, content)
        if lease.evaluation:
            if not self._evaluations.finish(lease.submission, content):
                return False
        elif not self._ledger.holds(worker, lease.index, lease.submission):
            return False
        elif (reason := self._selection.reason_to_reject(record)) is not None:
            self._ledger.reject(lease.index)
            self._note_refused(reason)
        else:
            self._ledger.finish(lease.index, record.n_tokens, content)
            self._selection.note_accepted()
        if not lease.evaluation:
            self._fatal = self._fatal or self._selection.note_scores(record)
        self._roster.note_return(worker)
        self._counts.update(answer_tokens=record.n_answer_tokens, groups=1)
        self._counts.update({f"reward_{kind}": n for kind, n in record.failures.items()})
        await self._notify(answered=lease.evaluation)
        return True

    async def give_back(self, worker: str, lease: Lease, reason: str, *, counts: bool) -> None:
        """A lease ended without an answer. `counts` says whether the group itself may be the cause."""
        if lease.evaluation:
            self._give_back_evaluation(lease.submission, lease.index, reason, counts=counts)
        elif self._ledger.holds(worker, lease.index, lease.submission):
            logger.warning("prompt group %d came back from %s: %s", lease.index, worker, reason)
            if not self._ledger.give_back(lease.index, counts=counts):
                self._note_refused(f"given up after {self._ledger.max_attempts} attempts: {reason}")
        else:
            return  # revoked before
        self._roster.note_return(worker)
        await self._notify()

    async def fail(self, reason: str, kind: type[Exception] = RolloutError) -> None:
        """A worker cannot go on whatever is tried: every `take` raises `kind` with `reason`."""
        self._fatal = self._fatal or kind(reason)
        await self._notify()

    async def check(self) -> None:
        """Raises what a worker reported, RolloutError or GroupFilterError, if it cannot go on."""
        if self._fatal is not None:
            raise self._fatal

    # -- trainer

    async def begin(self, state: Mapping[str, Any] | None = None, *, published: bool = False) -> None:
        """A trainer starts, or goes on with a controller that was restarted. Workers register again, old leases are void.

        Args:
            state: see `state_dict`; None is the beginning.
            published: the trainer has published before and is in mid-run.
        """
        self._dispatcher.dismiss_all()
        self._clear(self._ledger.submissions)
        if state is not None:
            self._ledger.load_state_dict(state)
        self._published = published

    async def publish(self, version: int, workers: Sequence[str]) -> None:
        """`version` is live in these workers' engines: admission grows, they may lease."""
        self._roster.mark_synced(workers, version)
        self._ledger.advance(version)
        self._published = True
        await self._notify()

    async def workers(self) -> list[tuple[str, Any]]:
        """(name, handle) of every worker that is ready."""
        return [(e.name, e.handle) for e in self._roster]

    async def take(self, version: int, rank: int = 0, world_size: int = 1, wait_s: float = 5.0) -> Share | Waiting:
        """This rank's share of the batch for the step that starts from `version`.

        Raises:
            RolloutError, GroupFilterError: there will never be one; says why.
            StepLostError: there was one, before the controller was restarted.
        """
        deadline = self._clock() + wait_s
        await self.check()  # also where there is a batch: a trainer that never waits would go on for ever
        while (groups := self._shares.take(version, rank, world_size)) is None:
            if not await self._wait_until(deadline):
                return self._waiting_report(version)
            await self.check()
        contents = tuple(group.content for group in groups)
        return Share(version, contents, self._ledger.state_dict(version + 1) if rank == 0 else None)

    async def lost(self, version: int, rank: int, places: Sequence[int]) -> None:
        """What stood at these places of the rank's share went down with its node: the groups are answered again, first.

        The rank's next `take` gives the others and as many more as are missing, once there are.

        Raises:
            StepLostError: the share itself is gone, because the controller was restarted since.
        """
        n_lost = self._shares.lose(version, rank, places)
        logger.warning("the answers of %d prompt groups were lost with their node: they are answered again first", n_lost)
        await self._notify()

    async def begin_evaluation(self, positions: Sequence[int]) -> int:
        """Queues validation prompts; returns the id to take the answers by."""
        evaluation = self._evaluations.begin(positions)
        await self._notify()
        return evaluation

    async def take_evaluation(self, evaluation: int, wait_s: float = 5.0) -> Share | Waiting:
        """All answers of an evaluation in the order of their positions, once complete."""
        deadline = self._clock() + wait_s
        if not self._evaluations.knows(evaluation):
            raise StepLostError("the validation under way was lost with the controller's process; go on from the checkpoint")
        while (contents := self._evaluations.results(evaluation)) is None:
            await self.check()
            if not await self._wait_until(deadline):
                answered, wanted = self._evaluations.progress(evaluation)
                return Waiting(f"{answered} of {wanted} validation prompts answered, {self._describe()}", self._unsynced())
        return Share(self._ledger.version, tuple(contents))

    # -- state

    async def statistics(self) -> dict[str, float]:
        """Counters since the start and gauges of now, for logs."""
        engine_s, busy_s = self._roster.total("alive_s"), self._roster.total("busy_s")
        return {
            "generated_tokens": float(self._counts["answer_tokens"]),
            "groups_running": float(len(self._ledger.running)),
            "groups_buffered": float(len(self._ledger.finished)),
            "groups_rejected": float(self._ledger.rejected),
            "groups_abandoned": float(self._ledger.abandoned),
            "groups_requeued": float(self._ledger.requeued),
            "engine_restarts": float(self._roster.restarts),
            "engine_busy_s": busy_s,
            "engine_idle_share": 1.0 - busy_s / engine_s if engine_s else 0.0,
            "workers_alive": float(len(self._roster)),
            **{k: float(self._counts[k]) for k in ("reward_error", "reward_timeout", "reward_memory")},
        }

    async def state_dict(self, version: int) -> dict[str, Any]:
        """The run's memory of the data, see `RolloutLedger.state_dict`."""
        return self._ledger.state_dict(version)

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a saved run stood."""
        self._ledger.load_state_dict(state)

    # -- inside

    async def _claim(self, worker: str, content: Any) -> Any:
        """Makes `content` independent of the life of the worker that made it; here it is that already."""
        return content

    def _dispatch(self) -> None:
        """Leases what may start; nothing before the engines have weights."""
        if self._published:
            self._dispatcher.dispatch(self._clock())

    def _expire(self) -> None:
        """Returns the leases of silent workers and of groups that take too long. Called at every turn, looks only when due."""
        now, s = self._clock(), self._settings
        if now < self._nothing_expires_before_s:
            return
        for worker in self._roster.lost(now):
            logger.warning("%s was silent for over %.0f s: its prompt groups go to other workers", worker, self._roster.timeout_s)
            self._drop_leases(worker)
            self._roster.remove(worker)
        for group in self._ledger.started_before(now - s.lease_timeout_s):
            logger.warning("prompt group %d on %s took over %.0f s", group.index, group.worker, s.lease_timeout_s)
            self._revoked[group.worker].append(group.submission)
            self._roster.note_return(group.worker)
            if not self._ledger.give_back(group.index):
                self._note_refused(f"not answered within {s.lease_timeout_s:.0f} s (lease_timeout_s)")
        for submission, lease in self._evaluations.started_before(now - s.lease_timeout_s):
            logger.warning("validation prompt %d on %s took over %.0f s", lease.position, lease.worker, s.lease_timeout_s)
            self._revoked[lease.worker].append(-submission)  # as workers tell them from those of training
            self._roster.note_return(lease.worker)
            reason = f"not answered within {s.lease_timeout_s:.0f} s (lease_timeout_s)"
            self._give_back_evaluation(submission, lease.position, reason, counts=True)
        # Whatever starts from here on, or is heard of again, expires later than this.
        oldest_s = min(self._ledger.oldest_start_s(now), self._evaluations.oldest_start_s(now))
        self._nothing_expires_before_s = min(self._roster.next_loss_s(now), oldest_s + s.lease_timeout_s)

    def _give_back_evaluation(self, submission: int, position: int, reason: str, *, counts: bool) -> None:
        if not self._evaluations.give_back(submission, counts=counts):
            tried = f"validation prompt {position} was given up after {self._evaluations.max_attempts} attempts"
            self._fatal = self._fatal or RolloutError(f"{tried}: {reason}")

    def _drop_leases(self, worker: str) -> None:
        self._dispatcher.dismiss(worker)  # if it asked in an earlier life, nobody would get its leases
        lost = self._ledger.give_back_all(worker)
        self._evaluations.give_back_all(worker)
        if lost:
            logger.warning("%s lost %d prompt groups in flight; they are answered again first: %s", worker, len(lost), lost)

    def _note_refused(self, reason: str) -> None:
        """A group will not be trained on; one too many of them ends the run."""
        self._fatal = self._fatal or self._selection.note_refused(reason)

    def _unsynced(self) -> tuple[tuple[str, Any], ...]:
        return tuple((e.name, e.handle) for e in self._roster.unsynced(self._ledger.version)) if self._published else ()

    def _waiting_report(self, version: int) -> Waiting:
        wanted = self._settings.gate.batch_size
        return Waiting(f"step {version + 1} needs {wanted} prompt groups: {self._describe()}", self._unsynced())

    def _describe(self) -> str:
        ledger, now = self._ledger, self._clock()
        text = (
            f"{len(ledger.finished)} finished, {len(ledger.running)} leased to {len(self._roster)} live workers, "
            f"{ledger.rejected} rejected, {ledger.abandoned} given up so far"
        )
        if ledger.running:
            oldest = min(ledger.running.values(), key=lambda g: g.started_s)
            text += f"; the oldest lease is group {oldest.index} on {oldest.worker} for {now - oldest.started_s:.0f} s"
        return text

    async def _notify(self, *, answered: bool = False) -> None:
        """Something changed: leases what may start, and wakes the trainer if there may be something to take.

        Its ranks are many and groups come by the thousand: no rank is woken to find that it must wait. `answered` says that a
        validation prompt was.
        """
        self._expire()
        self._dispatch()
        if answered or self._fatal is not None or self._shares.incomplete or self._ledger.ready():
            async with self._changed:
                self._changed.notify_all()

    async def _wait_until(self, deadline: float) -> bool:
        """Waits for any change; False once the deadline has passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(1.0, deadline - self._clock()))), self._changed:
                await self._changed.wait()
        self._expire()
        self._dispatch()
        return self._clock() < deadline
