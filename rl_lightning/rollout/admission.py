"""StalenessGate: how many more prompt groups may start now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StalenessGate:
    """The admission rule of AReaL (arXiv 2505.24298, Eq. 3), counted in prompt groups.

    With B = `batch_size`, eta = `max_head_offpolicyness` and v = finished training steps, a group may start only while

        consumed + buffered + running < (v + eta + 1) * B      and      running < max_concurrent_rollouts.

    At eta = 0 that is synchronous training: exactly the groups of step v run while the weights are those of version v.

    Args:
        batch_size: prompt groups that one training step consumes, over all ranks.
        max_head_offpolicyness: eta, how many versions old a trained answer's first token may be.
        max_concurrent_rollouts: most groups in flight.
    """

    batch_size: int
    max_head_offpolicyness: int
    max_concurrent_rollouts: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1 prompt per training step")
        if self.max_head_offpolicyness < 0:
            raise ValueError(f"max_head_offpolicyness={self.max_head_offpolicyness} must be 0 (synchronous) or more")
        if self.max_concurrent_rollouts < 1:
            raise ValueError(f"max_concurrent_rollouts={self.max_concurrent_rollouts} must be at least 1")

    def capacity(self, *, version: int, accepted: int, running: int) -> int:
        """Groups that may start now.

        Args:
            version: finished training steps.
            accepted: groups consumed or buffered.
            running: groups in flight.
        """
        by_staleness = (version + self.max_head_offpolicyness + 1) * self.batch_size - accepted - running
        return max(0, min(by_staleness, self.max_concurrent_rollouts - running))
