"""GroupSelection: which answered groups are trained on, and when too few are or none was scored."""

from __future__ import annotations

from collections import Counter

from rl_lightning.rollout.errors import RejectionsError, RewardsError
from rl_lightning.rollout.group_record import GroupRecord

LEAST_UNSCORED = 8
"""Fewer prompts may be hard ones, on which a reward runs out of time."""


class GroupSelection:
    """Rejects groups by their record, and counts those in a row that nothing came of.

    Args:
        success_rate_lb, success_rate_ub: a group whose share of successful answers lies outside is rejected.
        max_in_a_row: groups rejected or abandoned in a row at which the run cannot go on.
        batch_size: first groups of which none has a reward that could be computed, at which it cannot either; 8 at least.
    """

    def __init__(self, success_rate_lb: float, success_rate_ub: float, max_in_a_row: int, batch_size: int) -> None:
        self._bounds = (success_rate_lb, success_rate_ub)
        self._max_in_a_row, self._max_unscored = max_in_a_row, max(LEAST_UNSCORED, batch_size)
        self._in_a_row = self._unscored = 0
        self._failures: Counter[str] = Counter()

    def reason_to_reject(self, record: GroupRecord) -> str | None:
        """Why the group is not trained on; None if it is."""
        low, high = self._bounds
        if not low <= record.success_rate <= high:
            return "success rate outside [success_rate_lb, success_rate_ub]"
        return None if record.passes_filter else "group_filter returned false"

    def note_scores(self, record: GroupRecord) -> RewardsError | None:
        """A group is answered; why the run cannot go on, if it is one more of those that nothing could be learnt from."""
        if record.is_scored:
            self._max_unscored = 0  # they work: what fails from now on fails on some answers
        if not self._max_unscored:
            return None
        self._unscored += 1
        self._failures.update(record.failures)
        if self._unscored < self._max_unscored:
            return None
        failures = ", ".join(f"{n} x {kind}" for kind, n in self._failures.items())
        return RewardsError(
            f"rewards failed on all answers to the first {self._unscored} prompts ({failures}): the warnings above say how; "
            f"try the reward on an answer by itself, or give it more reward_timeout_s or reward_memory_gb"
        )

    def note_accepted(self) -> None:
        """A group will be trained on."""
        self._in_a_row = 0

    def note_refused(self, reason: str) -> RejectionsError | None:
        """A group will not be trained on; why the run cannot go on, if that was one too many."""
        self._in_a_row += 1
        if self._in_a_row < self._max_in_a_row:
            return None
        low, high = self._bounds
        return RejectionsError(
            f"{self._in_a_row} prompt groups in a row were not trained on, the last one because: {reason}; check the rewards, "
            f"group_filter, success_rate_lb={low} and success_rate_ub={high}, or raise max_rejections"
        )
