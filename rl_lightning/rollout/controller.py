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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rl_lightning.batching.balance import balance
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.evaluation import EvaluationQueue
from rl_lightning.rollout.ledger import FinishedGroup, RolloutLedger
from rl_lightning.rollout.roster import SchedulePolicy, WorkerRoster
from rl_lightning.types import Lease, SamplingParams

if TYPE_CHECKING:
    from rl_lightning.prompts.dataset import PromptDataset
    from rl_lightning.prompts.source import PromptSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerSettings:
    """What the controller needs to know of a run; times in seconds.

    Attributes:
        gate: the staleness rule.
        group_size: answers to each training prompt.
        params: how training answers are sampled.
        seed: of the run.
        n_groups: groups that the run trains on in all, None if open-ended.
        success_rate_lb, success_rate_ub: a group whose share of successful answers lies outside is rejected.
        max_rejections: groups rejected or abandoned in a row, after which the run is stopped with the reason.
        lease_timeout_s: longest time for one group; then it is given to another worker.
        worker_timeout_s: longest silence of a worker.
        policy: which worker gets the next group.
        evaluation_group_size, evaluation_params: the same for validation.
    """

    gate: StalenessGate
    group_size: int
    params: SamplingParams
    seed: int = 1
    n_groups: int | None = None
    success_rate_lb: float = 0.0
    success_rate_ub: float = 1.0
    max_rejections: int = 1000
    lease_timeout_s: float = 5400.0
    worker_timeout_s: float = 60.0
    policy: SchedulePolicy = "least_token_usage"
    evaluation_group_size: int = 1
    evaluation_params: SamplingParams = SamplingParams()


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """The little that the controller reads of a finished group; the group itself travels as a reference.

    Attributes:
        n_tokens: prompt and answer tokens of all sequences.
        n_answer_tokens: generated tokens.
        success_rate: share of answers with a positive reward.
        failures: reward failures by kind.
        passes_filter: what the user's `group_filter` says of it.
    """

    n_tokens: int
    n_answer_tokens: int
    success_rate: float
    failures: Mapping[str, int] = field(default_factory=dict)
    passes_filter: bool = True


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing to take yet: what is missing, in words, and which workers (name, handle) need the current weights."""

    report: str
    unsynced: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a batch.

    Attributes:
        version: of the weights that the step starts from.
        contents: what the workers put, oldest group first.
        state: for rank 0 of a training step: what `begin` goes on from if the controller dies before the next one.
    """

    version: int
    contents: tuple[Any, ...]
    state: Mapping[str, Any] | None = field(default=None, compare=False)


class RolloutError(RuntimeError):
    """The rollout side cannot go on; the message says why and what to change."""


class StepLostError(RuntimeError):
    """What the step under way needs is gone; the engines are well, and another attempt from the checkpoint has it again."""


class GroupFilterError(ValueError):
    """The user's `group_filter` raised; the message names it and the group."""


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
        self._waiting: dict[str, tuple[int, asyncio.Future[list[Lease]]]] = {}
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._clear(first_submission=0)

    def _clear(self, first_submission: int) -> None:
        """Everything as at the start, but for the counters."""
        settings = self._settings
        self._ledger = RolloutLedger(settings.gate, settings.n_groups, first_submission=first_submission)
        self._roster = WorkerRoster(settings.worker_timeout_s, settings.policy)
        self._evaluations = EvaluationQueue()
        self._revoked: defaultdict[str, list[int]] = defaultdict(list)
        self._shares: tuple[int, list[list[FinishedGroup]]] | None = None
        self._missing: Counter[int] = Counter()
        self._published = False
        self._rejected_in_a_row = 0
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

    async def lease(self, worker: str, room: int, poll_s: float = 10.0) -> list[Lease]:
        """Up to `room` groups for `worker`, as soon as there is one; empty after `poll_s`."""
        future: asyncio.Future[list[Lease]] = asyncio.get_running_loop().create_future()
        self._waiting[worker] = (room, future)
        self._dispatch()
        await asyncio.wait([future], timeout=poll_s)
        if self._waiting.get(worker, (0, None))[1] is future:
            del self._waiting[worker]
        return future.result() if future.done() else []

    async def put(self, worker: str, lease: Lease, record: GroupRecord, content: Any) -> bool:
        """A group is answered. False, and nothing happens, if the lease was given to another worker meanwhile."""
        if self._roster.get(worker) is None:
            return False  # it held nothing since it was lost, or since the trainer began anew
        content = await self._claim(worker, content)
        if lease.evaluation:
            self._evaluations.finish(lease.submission, content)
        elif not self._ledger.holds(worker, lease.index, lease.submission):
            return False
        elif (reason := self._reason_to_reject(record)) is not None:
            self._ledger.reject(lease.index)
            self._count_rejection(reason)
        else:
            self._ledger.finish(lease.index, record.n_tokens, content)
            self._rejected_in_a_row = 0
        self._roster.note_return(worker)
        self._counts.update(answer_tokens=record.n_answer_tokens, groups=1)
        self._counts.update({f"reward_{kind}": n for kind, n in record.failures.items()})
        await self._notify(answered=lease.evaluation)
        return True

    async def give_back(self, worker: str, lease: Lease, reason: str, *, counts: bool) -> None:
        """A lease ended without an answer. `counts` says whether the group itself may be the cause."""
        if lease.evaluation:
            self._evaluations.give_back(lease.submission)
        elif self._ledger.holds(worker, lease.index, lease.submission):
            logger.warning("prompt group %d came back from %s: %s", lease.index, worker, reason)
            if not self._ledger.give_back(lease.index, counts=counts):
                self._count_rejection(f"given up after {self._ledger.max_attempts} attempts: {reason}")
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
        for _, future in self._waiting.values():
            if not future.done():
                future.set_result([])
        self._waiting.clear()
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
        while not (self._compose(version, world_size) and self._complete(rank)):
            await self.check()
            if not await self._wait_until(deadline):
                return self._waiting_report(version)
        assert self._shares is not None
        contents = tuple(group.content for group in self._shares[1][rank])
        return Share(version, contents, self._ledger.state_dict(version + 1) if rank == 0 else None)

    async def lost(self, version: int, rank: int, places: Sequence[int]) -> None:
        """What stood at these places of the rank's share went down with its node: the groups are answered again, first.

        The rank's next `take` gives the others and as many more as are missing, once there are.

        Raises:
            StepLostError: the share itself is gone, because the controller was restarted since.
        """
        if self._shares is None or self._shares[0] != version:
            raise _gone(version)
        share = self._shares[1][rank]
        groups = [share[place] for place in places]
        logger.warning("the answers of %d prompt groups were lost with their node: they are answered again first", len(groups))
        self._ledger.lose([group.index for group in groups])
        self._shares[1][rank] = [group for group in share if group not in groups]
        self._missing[rank] += len(groups)
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
        """Gives what may start now to the workers that wait, one group at a time to the best of them."""
        if not (self._waiting and self._may_start()):
            return
        granted: defaultdict[str, list[Lease]] = defaultdict(list)
        turns = self._roster.turns({worker: room for worker, (room, _) in self._waiting.items()}, self._ledger.version)
        while self._may_start() and (entry := next(turns, None)) is not None:
            lease = self._next_lease(entry.name)
            granted[entry.name].append(lease)
            self._roster.note_grant(entry, lease.group_size * len(lease.prompt.token_ids))
        for worker, leases in granted.items():
            future = self._waiting[worker][1]
            if not future.done():
                del self._waiting[worker]
                future.set_result(leases)

    def _may_start(self) -> bool:
        return self._published and (self._evaluations_have_room() or self._ledger.capacity() > 0)

    def _evaluations_have_room(self) -> bool:
        return self._evaluations.pending > 0 and self._evaluations.running < self._settings.gate.max_concurrent_rollouts

    def _next_lease(self, worker: str) -> Lease:
        s = self._settings
        if self._evaluations_have_room():
            assert self._validation is not None, "evaluation of a run without validation prompts"
            position, submission = self._evaluations.submit(worker)
            prompt, size, params = self._validation[position], s.evaluation_group_size, s.evaluation_params
            return Lease(position, prompt, size, params, s.seed, submission, evaluation=True)
        group = self._ledger.submit(worker, self._clock())
        return Lease(group.index, self._source.prompt(group.index), s.group_size, s.params, s.seed, group.submission)

    def _compose(self, version: int, world_size: int) -> bool:
        """Makes the shares of `version`'s batch on the first rank's call; the others find them."""
        if self._shares is not None and self._shares[0] == version:
            return True
        if version < self._ledger.version:
            raise _gone(version)
        if version != self._ledger.version or (batch := self._ledger.take()) is None:
            return False
        parts = balance([g.n_tokens for g in batch], world_size)
        self._shares = (version, [[batch[i] for i in part] for part in parts])
        return True

    def _complete(self, rank: int) -> bool:
        """Fills the places of groups that were lost."""
        if self._missing[rank]:
            if (more := self._ledger.take(self._missing[rank])) is None:
                return False
            assert self._shares is not None
            self._shares[1][rank] += more
            del self._missing[rank]
        return True

    def _expire(self) -> None:
        """Returns the leases of silent workers and of groups that take too long. Called at every turn, looks only when due."""
        now, s = self._clock(), self._settings
        if now < self._nothing_expires_before_s:
            return
        for worker in self._roster.lost(now):
            logger.warning("%s was silent for over %.0f s: its prompt groups go to other workers", worker, self._roster.timeout_s)
            self._drop_leases(worker)
            self._roster.remove(worker)
        for group in [g for g in self._ledger.running.values() if now - g.started_s > s.lease_timeout_s]:
            logger.warning("prompt group %d on %s took over %.0f s", group.index, group.worker, s.lease_timeout_s)
            self._revoked[group.worker].append(group.submission)
            if not self._ledger.give_back(group.index):
                self._count_rejection(f"not answered within {s.lease_timeout_s:.0f} s (lease_timeout_s)")
        # Whatever starts from here on, or is heard of again, expires later than this.
        silent = min((entry.last_seen_s for entry in self._roster), default=now)
        started = min((group.started_s for group in self._ledger.running.values()), default=now)
        self._nothing_expires_before_s = min(silent + s.worker_timeout_s, started + s.lease_timeout_s)

    def _drop_leases(self, worker: str) -> None:
        _, waiting = self._waiting.pop(worker, (0, None))
        if waiting is not None and not waiting.done():  # if it was of an earlier life, nobody would get its leases
            waiting.set_result([])
        lost = self._ledger.give_back_all(worker)
        self._evaluations.give_back_all(worker)
        if lost:
            logger.warning("%s lost %d prompt groups in flight; they are answered again first: %s", worker, len(lost), lost)

    def _reason_to_reject(self, record: GroupRecord) -> str | None:
        if not self._settings.success_rate_lb <= record.success_rate <= self._settings.success_rate_ub:
            return "success rate outside [success_rate_lb, success_rate_ub]"
        return None if record.passes_filter else "group_filter returned false"

    def _count_rejection(self, reason: str) -> None:
        self._rejected_in_a_row += 1
        if self._rejected_in_a_row >= self._settings.max_rejections:
            self._fatal = RolloutError(
                f"{self._rejected_in_a_row} prompt groups in a row were not trained on, the last one because: {reason}; "
                f"check the rewards, group_filter, success_rate_lb={self._settings.success_rate_lb} and "
                f"success_rate_ub={self._settings.success_rate_ub}, or raise max_rejections"
            )

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
        if answered or self._fatal is not None or self._missing or self._ledger.ready():
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


def _gone(version: int) -> StepLostError:
    return StepLostError(f"the batch of step {version + 1} was lost with the controller's process; go on from the checkpoint")
