"""RolloutLedger: which prompt group is where. The arithmetic of the asynchronous loop, without clocks or processes."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rl_lightning.rollout.admission import StalenessGate


@dataclass(frozen=True, slots=True)
class RunningGroup:
    """A group in flight: who answers it, since which version, as which submission."""

    index: int
    worker: str
    version: int
    submission: int
    started_s: float


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """A group waiting to be trained on. `content` is whatever the owner of the ledger stores (an object reference)."""

    index: int
    version: int
    submission: int
    n_tokens: int
    content: Any


class RolloutLedger:
    """Bookkeeping of prompt groups from submission to training.

    A group is *open* from its first lease until a training step consumed it; the saved state is the next unseen index
    and the open indices, so a resumed run answers every prompt that was not trained on, and no other.

    Staleness is exact, not approximate: a group leased at version w is due at step w + eta. `take` gives the oldest B
    finished groups by submission, but only if every group left behind can still meet its due step at B groups a step;
    otherwise it gives nothing and the trainer waits for the straggler.  Because admission bounds the open groups
    (`StalenessGate`), waiting always ends once all open groups finished.

    Args:
        gate: the admission rule.
        n_groups: groups that the whole run will train on, None if unknown; nothing is submitted beyond it. A run that goes on
            with fewer prompts or another batch size has more steps than that: with the first of them the end is unknown.
        max_attempts: leases of one group before it is given up.
        first_submission: number of the first lease; a ledger that follows another one goes on where that one stood.
    """

    def __init__(
        self, gate: StalenessGate, n_groups: int | None = None, max_attempts: int = 4, first_submission: int = 0
    ) -> None:
        self.gate = gate
        self.n_groups = n_groups
        self.max_attempts = max_attempts
        self.version = 0
        self.rejected = 0
        self.abandoned = 0
        self.requeued = 0
        self.running: dict[int, RunningGroup] = {}
        self.finished: dict[int, FinishedGroup] = {}
        self.training: list[int] = []
        self._next_index = 0
        self._returned: list[int] = []
        self._attempts: dict[int, int] = {}
        self.submissions = first_submission
        # How many groups were leased at each version: whether a batch may be taken is asked after every finished group, and
        # must not cost a look at all of them.
        self._running_since: Counter[int] = Counter()
        self._finished_since: Counter[int] = Counter()

    @property
    def consumed(self) -> int:
        """Groups of the finished steps, in batches of the present size whatever it was before, and of the one under way."""
        return self.version * self.gate.batch_size + len(self.training)

    # -- submission

    def capacity(self) -> int:
        """Groups that may be leased now."""
        accepted = self.consumed + len(self.finished)
        room = self.gate.capacity(version=self.version, accepted=accepted, running=len(self.running))
        if self.n_groups is not None:
            room = min(room, self.n_groups - accepted - len(self.running))
        return max(0, room)

    def submit(self, worker: str, now_s: float) -> RunningGroup:
        """Leases the next group to `worker`: a returned one first, else the next unseen index."""
        assert self.capacity() > 0, "submit without capacity"
        if self._returned:
            index = heapq.heappop(self._returned)
        else:
            index = self._next_index
            self._next_index += 1
        group = RunningGroup(index, worker, self.version, self.submissions, now_s)
        self.submissions += 1
        self.running[index] = group
        self._running_since[group.version] += 1
        return group

    # -- results

    def holds(self, worker: str, index: int, submission: int) -> bool:
        """Whether `worker` still has this very lease of `index`; if not, its result is late and must be dropped."""
        group = self.running.get(index)
        return group is not None and group.worker == worker and group.submission == submission

    def finish(self, index: int, n_tokens: int, content: Any) -> None:
        """The group is answered and waits to be trained on."""
        group = self._stop(index)
        self._finished_since[group.version] += 1
        self.finished[index] = FinishedGroup(index, group.version, group.submission, n_tokens, content)

    def reject(self, index: int) -> None:
        """The group will not be trained on (filtered); its place is free again."""
        self._stop(index)
        self._attempts.pop(index, None)
        self.rejected += 1

    def give_back(self, index: int, *, counts: bool = True) -> bool:
        """The lease ended without an answer: the group goes to the front of the queue.

        Args:
            index: the group.
            counts: whether this was the group's fault as far as one can know (not when its worker died).

        Returns:
            False if the group was tried `max_attempts` times and is abandoned instead.
        """
        self._stop(index)
        if counts:
            self._attempts[index] = self._attempts.get(index, 0) + 1
        if self._attempts.get(index, 0) >= self.max_attempts:
            self._attempts.pop(index)
            self.abandoned += 1
            return False
        heapq.heappush(self._returned, index)
        self.requeued += 1
        return True

    def give_back_all(self, worker: str) -> list[int]:
        """Everything `worker` held goes to the front of the queue; returns the indices."""
        lost = [g.index for g in self.running.values() if g.worker == worker]
        for index in lost:
            self.give_back(index, counts=False)
        return lost

    def started_before(self, limit_s: float) -> list[RunningGroup]:
        """Groups in flight that were leased before `limit_s`."""
        return [group for group in self.running.values() if group.started_s < limit_s]

    def oldest_start_s(self, now_s: float) -> float:
        """When the oldest group in flight was leased; `now_s` if there is none."""
        return min((group.started_s for group in self.running.values()), default=now_s)

    # -- training

    def ready(self, size: int | None = None) -> bool:
        """Whether `take` gives a batch now: B groups are finished, and those left behind can all meet their step.

        With the B oldest taken, for every j at most j * B remaining groups may be due within the next j steps. A later
        submission is never due before an earlier one, so the oldest B are those that are due first.

        Args:
            size: groups wanted, where it is not a whole batch B.
        """
        due_now = self.version - self.gate.max_head_offpolicyness
        size = self.gate.batch_size if size is None else size
        if len(self.finished) < size:
            return False
        running = finished = 0
        for version in sorted(self._running_since.keys() | self._finished_since.keys()):
            running += self._running_since[version]
            finished += self._finished_since[version]
            if running + max(0, finished - size) > max(0, version - due_now) * self.gate.batch_size:
                return False
        return True

    def take(self, size: int | None = None) -> list[FinishedGroup] | None:
        """The batch of step `version`, or `size` groups more for it, oldest first; None while it must wait."""
        size = self.gate.batch_size if size is None else size
        if self.n_groups is not None and self.n_groups < (self.version + 1) * self.gate.batch_size:
            self.n_groups = None
        if not self.ready(size):
            return None
        batch = heapq.nsmallest(size, self.finished.values(), key=lambda g: g.submission)
        for group in batch:
            del self.finished[group.index]
            self._attempts.pop(group.index, None)
        self._finished_since.subtract(group.version for group in batch)
        self.training += [group.index for group in batch]
        return batch

    def lose(self, indices: list[int]) -> None:
        """These groups of the batch cannot be trained on, their arrays are gone: they go to the front of the queue."""
        self.training = [index for index in self.training if index not in indices]
        self.requeued += len(indices)
        for index in indices:
            heapq.heappush(self._returned, index)

    def advance(self, version: int) -> None:
        """The weights of `version` are live in the engines."""
        assert version >= self.version, f"version went back from {self.version} to {version}"
        if version > self.version:
            self.training = []
        self.version = version
        for since in (self._running_since, self._finished_since):
            for past in [v for v, count in since.items() if not count]:
                del since[past]

    # -- saving

    def state_dict(self, version: int) -> dict[str, Any]:
        """Plain data from which `load_state_dict` goes on: the position, the open indices and the counters.

        Args:
            version: training steps that the saved model has finished. A batch that was taken for a step which it has
                not finished is still open.
        """
        training = self.training if version == self.version else []
        return {
            "version": version,
            "next_index": self._next_index,
            "open": sorted([*self.running, *self.finished, *training, *self._returned]),
            "rejected": self.rejected,
            "abandoned": self.abandoned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a position; the open groups are leased again, first."""
        assert not self.running and not self.finished, "load_state_dict needs a ledger with nothing in flight"
        self.version = state["version"]
        self._next_index = state["next_index"]
        self.rejected, self.abandoned = state["rejected"], state["abandoned"]
        self._returned = list(state["open"])
        heapq.heapify(self._returned)

    # -- inside

    def _stop(self, index: int) -> RunningGroup:
        """The group is in flight no longer."""
        group = self.running.pop(index)
        self._running_since[group.version] -= 1
        return group
