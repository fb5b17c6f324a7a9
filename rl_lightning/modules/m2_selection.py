"""select_m2: which tokens of a minibatch M2PO keeps, whatever the ranks and micro-batches that it was cut into."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl_lightning.modules.data_parallel import DataParallel
from rl_lightning.modules.policy_batch import PolicyBatch
from rl_lightning.objectives.corrections import m2_keep


def select_m2(policy: PolicyBatch, sequences: Sequence[int], ranks: DataParallel, *, threshold: float) -> None:
    """Fills in `policy.keep` for the loss tokens of `sequences`, this rank's part of the minibatch. A collective.

    Of tokens that drifted equally, as those with which answers to one prompt begin often do, the earlier ones are kept: those of
    earlier groups, not those of earlier ranks.

    Args:
        policy: with pi_prox of all these tokens.
        sequences: indices into this rank's batch.
        ranks: that hold the minibatch together.
        threshold: of `m2_keep`.
    """
    assert policy.keep is not None
    batch = policy.batch
    mine = policy.loss_tokens(sequences).nonzero().squeeze(1)
    of_token = torch.repeat_interleave(batch.group_ids, batch.cu_seqlens.diff().long())
    gathered = ranks.gather((policy.prox_logprobs[mine], batch.behav_logprobs[mine].double(), of_token[mine]))
    prox, behav, groups = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    order = groups.argsort(stable=True)
    everything = torch.ones_like(order, dtype=torch.bool)
    kept = torch.empty_like(everything)
    kept[order] = m2_keep(prox[order], behav[order], everything, threshold=threshold)
    start = sum(len(theirs) for theirs, _, _ in gathered[: ranks.index])
    policy.keep[mine] = kept[start : start + len(mine)]
