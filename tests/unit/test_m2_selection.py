"""M2PO's selection is that of the whole minibatch, whichever rank holds which group."""

from __future__ import annotations

from typing import Any

import torch
from training_samples import make_groups

from rl_lightning.batching.collate import collate
from rl_lightning.modules.data_parallel import DataParallel
from rl_lightning.modules.m2_selection import select_m2
from rl_lightning.modules.policy_batch import PolicyBatch
from rl_lightning.types import RolloutGroup


class Rank(DataParallel):
    """One of several ranks whose messages are in `mail`; the first round only fills it."""

    def __init__(self, index: int, mail: dict[int, Any]) -> None:
        self._index, self.mail = index, mail

    @property
    def index(self) -> int:
        return self._index

    def gather(self, value: Any) -> list[Any]:
        self.mail[self._index] = value
        return [self.mail[rank] for rank in sorted(self.mail)]


def drifted(groups: list[RolloutGroup]) -> PolicyBatch:
    """All tokens of a group's answers drifted by the same few amounts, so that there are many ties across groups."""
    batch = collate(groups)
    behav = torch.arange(len(batch.loss_mask)) % 3 / 10
    batch.behav_logprobs.copy_(behav)
    prox = torch.zeros(len(batch.loss_mask), dtype=torch.float64)
    return PolicyBatch(batch, torch.zeros_like(behav), prox, True, torch.zeros_like(batch.loss_mask))


def kept_by_group(policies: list[PolicyBatch]) -> dict[int, list[bool]]:
    kept: dict[int, list[bool]] = {}
    for policy in policies:
        assert policy.keep is not None
        of_token = torch.repeat_interleave(policy.batch.group_ids, policy.batch.cu_seqlens.diff().long())
        for group in policy.batch.group_ids.unique().tolist():
            kept[group] = policy.keep[(of_token == group) & policy.batch.loss_mask].tolist()
    return kept


def test_the_selection_does_not_depend_on_who_holds_which_group() -> None:
    groups = make_groups(seed=71, n_groups=4)
    pattern = [drifted([group]) for group in groups]  # behav by position in the group, so the same however groups are dealt
    whole = drifted(groups)
    whole.batch.behav_logprobs.copy_(torch.cat([policy.batch.behav_logprobs for policy in pattern]))
    select_m2(whole, range(whole.batch.n_seqs), Rank(0, {}), threshold=0.01)
    parts = [[3, 0], [1, 2]]
    mail: dict[int, Any] = {}
    for _ in range(2):
        policies = []
        for rank, chosen in enumerate(parts):
            policy = drifted([groups[i] for i in chosen])
            policy.batch.behav_logprobs.copy_(torch.cat([pattern[i].batch.behav_logprobs for i in chosen]))
            select_m2(policy, range(policy.batch.n_seqs), Rank(rank, mail), threshold=0.01)
            policies.append(policy)
    expected = kept_by_group([whole])
    assert kept_by_group(policies) == expected
    flags = [flag for flags in expected.values() for flag in flags]
    assert any(flags) and not all(flags)


def test_tokens_out_of_the_loss_and_other_minibatches_are_left_alone() -> None:
    policy = drifted(make_groups(seed=72))
    half = list(range(policy.batch.n_seqs // 2))
    select_m2(policy, half, DataParallel(), threshold=100.0)
    assert policy.keep is not None and torch.equal(policy.keep, policy.loss_tokens(half))
