"""GroupSelection: which answered groups are trained on, and when too few are."""

from __future__ import annotations

from rl_lightning.rollout.errors import RejectionsError
from rl_lightning.rollout.group_record import GroupRecord


class GroupSelection:
    """Rejects groups by their record, and counts those in a row that nothing came of.

    Args:
        success_rate_lb, success_rate_ub: a group whose share of successful answers lies outside is rejected.
        max_in_a_row: groups rejected or abandoned in a row at which the run cannot go on.
    """

    def __init__(self, success_rate_lb: float, success_rate_ub: float, max_in_a_row: int) -> None:
        self._bounds = (success_rate_lb, success_rate_ub)
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def reason_to_reject(self, record: GroupRecord) -> str | None:
        """Why the group is not trained on; None if it is."""
        low, high = self._bounds
        if not low <= record.success_rate <= high:
            return "success rate outside [success_rate_lb, success_rate_ub]"
        return None if record.passes_filter else "group_filter returned false"

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
