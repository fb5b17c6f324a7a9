"""Why the trainer gets no batch."""

from __future__ import annotations


class RolloutError(RuntimeError):
    """The rollout side cannot go on; the message says why and what to change."""


class RejectionsError(RolloutError):
    """Too many groups in a row were not trained on; another attempt would reject them again."""


class RewardsError(RolloutError):
    """Rewards fail on all answers; another attempt would see the same."""


class StepLostError(RuntimeError):
    """What the step under way needs is gone; the engines are well, and another attempt from the checkpoint has it again."""


class GroupFilterError(ValueError):
    """The user's `group_filter` raised; the message names it and the group."""
