"""ControllerSettings: what the controller needs to know of a run."""

from __future__ import annotations

from dataclasses import dataclass

from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.roster import SchedulePolicy
from rl_lightning.types import SamplingParams


@dataclass(frozen=True)
class ControllerSettings:
    """All that stays the same; times in seconds.

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
