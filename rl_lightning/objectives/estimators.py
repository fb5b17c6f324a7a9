"""AdvantageEstimator: the named ways from scores to advantages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rl_lightning.objectives.advantages import Level, normalize


@dataclass(frozen=True, slots=True)
class AdvantageEstimator:
    """What is done to scores before `gae` spreads them over tokens, and to advantages after.

    Attributes:
        mean_level: over what the mean is taken that is subtracted from a score; None subtracts nothing.
        std_level: over what the spread is taken that divides a score; None divides by nothing.
        leave_one_out: the mean is that of the other scores.
        over_batch: whether advantages are normalised over all loss tokens of the batch; None: as the option adv_norm says.
    """

    mean_level: Level | None = None
    std_level: Level | None = None
    leave_one_out: bool = False
    over_batch: bool | None = False

    def normalize_scores(self, scores: Tensor, group_ids: Tensor) -> Tensor:
        """(S,) scores of S answers less their baseline, over their spread; `group_ids` (S,) are equal within a group."""
        return normalize(
            scores, group_ids, mean_level=self.mean_level, std_level=self.std_level, leave_one_out=self.leave_one_out
        )


ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": AdvantageEstimator(over_batch=None),
    "grpo": AdvantageEstimator("group", "group"),
    "dr_grpo": AdvantageEstimator("group"),
    "rloo": AdvantageEstimator("group", leave_one_out=True),
    "reinforce++": AdvantageEstimator(over_batch=True),
    "reinforce++-baseline": AdvantageEstimator("group", over_batch=True),
}
"""GAE (arXiv 1506.02438), GRPO (2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740) and both REINFORCE++ (2501.03262)."""
