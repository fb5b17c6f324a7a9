"""EvaluationQueue: prompts answered for validation, beside the training rollouts and outside the staleness rule."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RunningPrompt:
    """A position being answered: for which evaluation, by whom, since when."""

    evaluation: int
    position: int
    worker: str
    started_s: float


@dataclass(slots=True)
class _Evaluation:
    wanted: int
    answered: dict[int, Any] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)


class EvaluationQueue:
    """Positions of a validation set on their way through the workers.

    Each rank begins its own evaluation and collects its own results; a lost worker's positions are answered again.

    Args:
        max_attempts: leases of one position before it is given up.
    """

    def __init__(self, max_attempts: int = 4) -> None:
        self.max_attempts = max_attempts
        self._evaluations: dict[int, _Evaluation] = {}
        self._pending: deque[tuple[int, int]] = deque()
        self._running: dict[int, RunningPrompt] = {}
        self._next_id = 0
        self._submissions = 0

    def begin(self, positions: Sequence[int]) -> int:
        """Queues `positions`; returns the id under which `results` gives the answers."""
        evaluation, self._next_id = self._next_id, self._next_id + 1
        self._evaluations[evaluation] = _Evaluation(len(positions))
        self._pending.extend((evaluation, position) for position in positions)
        return evaluation

    @property
    def pending(self) -> int:
        """Positions that nobody answers yet."""
        return len(self._pending)

    @property
    def running(self) -> int:
        """Positions being answered."""
        return len(self._running)

    def submit(self, worker: str, now_s: float) -> tuple[int, int]:
        """Leases the next position; returns (position, submission)."""
        evaluation, position = self._pending.popleft()
        self._submissions += 1
        self._running[self._submissions] = RunningPrompt(evaluation, position, worker, now_s)
        return position, self._submissions

    def finish(self, submission: int, content: Any) -> bool:
        """Stores an answer; False for one whose lease ended meanwhile: it is dropped."""
        lease = self._running.pop(submission, None)
        if lease is not None and lease.evaluation in self._evaluations:
            self._evaluations[lease.evaluation].answered[lease.position] = content
        return lease is not None

    def give_back(self, submission: int, *, counts: bool = False) -> bool:
        """The lease ended without an answer: to the front of the queue.

        Args:
            submission: the lease.
            counts: whether this was the prompt's fault as far as one can know (not when its worker died).

        Returns:
            False if the position was tried `max_attempts` times: it is given up.
        """
        lease = self._running.pop(submission, None)
        if lease is None or lease.evaluation not in self._evaluations:
            return True
        attempts = self._evaluations[lease.evaluation].attempts
        attempts[lease.position] += counts
        if attempts[lease.position] >= self.max_attempts:
            return False
        self._pending.appendleft((lease.evaluation, lease.position))
        return True

    def give_back_all(self, worker: str) -> None:
        """Everything this worker held goes to the front of the queue."""
        for submission in [s for s, lease in self._running.items() if lease.worker == worker]:
            self.give_back(submission)

    def started_before(self, limit_s: float) -> list[tuple[int, RunningPrompt]]:
        """(submission, what) of all that were leased before `limit_s`."""
        return [(submission, lease) for submission, lease in self._running.items() if lease.started_s < limit_s]

    def oldest_start_s(self, now_s: float) -> float:
        """When the oldest lease began; `now_s` if there is none."""
        return min((lease.started_s for lease in self._running.values()), default=now_s)

    def knows(self, evaluation: int) -> bool:
        """Whether `begin` gave this id and its results are still wanted."""
        return evaluation in self._evaluations

    def progress(self, evaluation: int) -> tuple[int, int]:
        """(answered, wanted)."""
        entry = self._evaluations[evaluation]
        return len(entry.answered), entry.wanted

    def results(self, evaluation: int) -> list[Any] | None:
        """All answers in the order of their positions, once complete; then the evaluation is forgotten."""
        entry = self._evaluations[evaluation]
        if len(entry.answered) < entry.wanted:
            return None
        del self._evaluations[evaluation]
        return [entry.answered[position] for position in sorted(entry.answered)]
