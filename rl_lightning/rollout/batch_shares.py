"""BatchShares: the batch of the step under way, shared out over the trainer's ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from rl_lightning.batching.balance import balance
from rl_lightning.rollout.errors import StepLostError
from rl_lightning.rollout.ledger import FinishedGroup, RolloutLedger


class BatchShares:
    """Makes the shares on the first rank's call; the others find theirs, and every rank may ask again.

    Args:
        ledger: where finished groups come from.
    """

    def __init__(self, ledger: RolloutLedger) -> None:
        self._ledger = ledger
        self._version: int | None = None
        self._shares: list[list[FinishedGroup]] = []
        self._missing: Counter[int] = Counter()

    @property
    def incomplete(self) -> bool:
        """Whether a rank waits for groups in the place of those that it lost."""
        return bool(self._missing)

    def take(self, version: int, rank: int, world_size: int) -> list[FinishedGroup] | None:
        """The rank's share of the step that starts from `version`, about as many tokens as the others'; None until there is one.

        Raises:
            StepLostError: the batch was taken from another ledger, in an earlier life of the controller.
        """
        if not (self._compose(version, world_size) and self._complete(rank)):
            return None
        return self._shares[rank]

    def lose(self, version: int, rank: int, places: Sequence[int]) -> int:
        """The groups at these places of the rank's share cannot be had any more and are answered again, first.

        Returns:
            How many they are.

        Raises:
            StepLostError: the share itself is gone.
        """
        if self._version != version:
            raise _gone(version)
        share = self._shares[rank]
        groups = [share[place] for place in places]
        self._ledger.lose([group.index for group in groups])
        self._shares[rank] = [group for group in share if group not in groups]
        self._missing[rank] += len(groups)
        return len(groups)

    def _compose(self, version: int, world_size: int) -> bool:
        if self._version == version:
            return True
        if version < self._ledger.version:
            raise _gone(version)
        if version != self._ledger.version or (batch := self._ledger.take()) is None:
            return False
        parts = balance([group.n_tokens for group in batch], world_size)
        self._version, self._shares = version, [[batch[i] for i in part] for part in parts]
        return True

    def _complete(self, rank: int) -> bool:
        """Fills up the shares of all ranks at once: what one of them leaves behind would be due in this very step."""
        if self._missing[rank]:
            if (more := self._ledger.take(self._missing.total())) is None:
                return False
            groups = iter(more)
            for incomplete, n_missing in self._missing.items():
                self._shares[incomplete] += islice(groups, n_missing)
            self._missing.clear()
        return True


def _gone(version: int) -> StepLostError:
    return StepLostError(f"the batch of step {version + 1} was lost with the controller's process; go on from the checkpoint")
