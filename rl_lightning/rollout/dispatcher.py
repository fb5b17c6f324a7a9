"""LeaseDispatcher: which prompt groups go to which of the workers that wait for some."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.evaluation import EvaluationQueue
from rl_lightning.rollout.ledger import RolloutLedger
from rl_lightning.rollout.roster import WorkerRoster
from rl_lightning.types import Lease

if TYPE_CHECKING:
    from rl_lightning.prompts.dataset import PromptDataset
    from rl_lightning.prompts.source import PromptSource

Leases = asyncio.Future[list[Lease]]


class LeaseDispatcher:
    """Leases validation prompts first, which are outside the staleness rule, then what the ledger admits.

    Args:
        source, validation: prompts by index, and by position.
        settings: how they are answered.
        ledger, evaluations: which of them are leased next.
        roster: who is the best to get them.
    """

    def __init__(
        self,
        source: PromptSource,
        validation: PromptDataset | None,
        settings: ControllerSettings,
        ledger: RolloutLedger,
        evaluations: EvaluationQueue,
        roster: WorkerRoster,
    ) -> None:
        self._source, self._validation, self._settings = source, validation, settings
        self._ledger, self._evaluations, self._roster = ledger, evaluations, roster
        self._waiting: dict[str, tuple[int, Leases]] = {}
        self._last: dict[str, tuple[int | None, Leases]] = {}

    def ask(self, worker: str, room: int, request: int | None) -> Leases:
        """`worker` waits for up to `room` groups: the future has them, as soon as there is one.

        Its last request, asked again, is the same one still: what it was granted did not arrive.
        """
        last, future = self._last.get(worker, (None, None))
        if future is None or request is None or request != last:
            future = asyncio.get_running_loop().create_future()
            self._last[worker] = (request, future)
        if not future.done():
            self._waiting[worker] = (room, future)
        return future

    def withdraw(self, worker: str, future: Leases) -> None:
        """`worker` does not wait for `future` any more."""
        if self._waiting.get(worker, (0, None))[1] is future:
            del self._waiting[worker]

    def dismiss(self, worker: str) -> None:
        """Whoever waits under this name gets nothing, and what it was granted is void."""
        self._last.pop(worker, None)
        _, future = self._waiting.pop(worker, (0, None))
        if future is not None and not future.done():
            future.set_result([])

    def dismiss_all(self) -> None:
        """All who wait get nothing."""
        for worker in list(self._waiting):
            self.dismiss(worker)

    def dispatch(self, now_s: float) -> None:
        """Gives what may start now to the workers that wait, one group at a time to the best of them."""
        if not (self._waiting and self._may_start()):
            return
        granted: defaultdict[str, list[Lease]] = defaultdict(list)
        turns = self._roster.turns({worker: room for worker, (room, _) in self._waiting.items()}, self._ledger.version)
        while self._may_start() and (entry := next(turns, None)) is not None:
            lease = self._next(entry.name, now_s)
            granted[entry.name].append(lease)
            self._roster.note_grant(entry, lease.group_size * len(lease.prompt.token_ids))
        for worker, leases in granted.items():
            future = self._waiting[worker][1]
            if not future.done():
                del self._waiting[worker]
                future.set_result(leases)

    def _may_start(self) -> bool:
        return self._evaluations_have_room() or self._ledger.capacity() > 0

    def _evaluations_have_room(self) -> bool:
        return self._evaluations.pending > 0 and self._evaluations.running < self._settings.gate.max_concurrent_rollouts

    def _next(self, worker: str, now_s: float) -> Lease:
        s = self._settings
        if self._evaluations_have_room():
            assert self._validation is not None, "evaluation of a run without validation prompts"
            position, submission = self._evaluations.submit(worker, now_s)
            prompt, size, params = self._validation[position], s.evaluation_group_size, s.evaluation_params
            return Lease(position, prompt, size, params, s.seed, submission, evaluation=True)
        group = self._ledger.submit(worker, now_s)
        return Lease(group.index, self._source.prompt(group.index), s.group_size, s.params, s.seed, group.submission)
