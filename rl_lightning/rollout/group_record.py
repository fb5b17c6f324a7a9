"""GroupRecord: what a worker tells the controller of a finished group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rl_lightning.types import Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """The little that the controller reads of a finished group; the group itself travels as a reference.

    Attributes:
        n_tokens: prompt and answer tokens of all sequences.
        n_answer_tokens: tokens of the answers that the policy generated.
        success_rate: share of answers with a positive reward.
        failures: reward failures by kind.
        is_scored: whether the rewards of any of its answers could be computed.
        passes_filter: what the user's `group_filter` says of it.
    """

    n_tokens: int
    n_answer_tokens: int
    success_rate: float
    failures: Mapping[str, int] = field(default_factory=dict)
    is_scored: bool = True
    passes_filter: bool = True

    @classmethod
    def of(cls, group: RolloutGroup, *, group_size: int, passes_filter: bool) -> GroupRecord:
        """The record of `group`.

        Raises:
            ValueError: it cannot be trained on, because the workflow gave more or fewer answers than `group_size`, or an empty or
                contradictory one.
        """
        answers, query_id = group.rollouts, group.prompt.query_id
        if len(answers) != group_size:
            raise ValueError(f"the workflow gave {len(answers)} answers instead of {group_size} to prompt {query_id!r}")
        for answer in answers:
            _check(answer, query_id)
        return cls(
            n_tokens=group.n_tokens,
            n_answer_tokens=sum(int(r.loss_mask.sum()) for r in answers),
            success_rate=sum(r.reward > 0 for r in answers) / len(answers),
            failures=Counter(r.reward_failure for r in answers if r.reward_failure),
            is_scored=not all(r.reward_failure for r in answers),
            passes_filter=passes_filter,
        )


def _check(answer: Rollout, query_id: str) -> None:
    """Arrays of other lengths would shift those of the answers after it in the batch, and with them what is trained on."""
    completion = answer.completion
    if not len(completion):
        raise ValueError(f"the workflow gave an answer without tokens to prompt {query_id!r}")
    beside = {"logprobs": completion.logprobs, "versions": completion.versions, "loss_mask": answer.loss_mask}
    for name, values in beside.items():
        if len(values) != len(completion):
            raise ValueError(
                f"the workflow gave {len(values)} {name} for the {len(completion)} tokens of an answer to prompt {query_id!r}"
            )
    if not math.isfinite(answer.reward):
        raise ValueError(f"the workflow gave the reward {answer.reward} to an answer to prompt {query_id!r}")
