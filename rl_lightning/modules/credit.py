"""assign_credit: from one score an answer, and what its tokens cost, to one number a token."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lightning.modules.scored_batch import ScoredBatch, loss_cu_seqlens
from rl_lightning.objectives.advantages import gae
from rl_lightning.types import Batch


def token_rewards(scores: Tensor, batch: Batch, penalties: Tensor | None = None) -> Tensor:
    """(T,) float64, 0 off the loss mask: each answer's score at its last loss token, less each token's penalty.

    Args:
        scores: (S,) of the answers; that of an answer without a loss token goes nowhere.
        batch: whose they are, on the CPU.
        penalties: (T,); what it holds off the loss mask does not matter.
    """
    ends = loss_cu_seqlens(batch)
    answered = ends.diff() > 0
    rewards = torch.zeros(int(ends[-1]), dtype=torch.float64)
    rewards[ends[1:][answered] - 1] = scores.double()[answered]
    if penalties is not None:
        rewards -= penalties.double()[batch.loss_mask]
    return _on_mask(rewards, batch)


def assign_credit(rewards: Tensor, batch: Batch, *, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """(T,) float64 advantages and returns by `gae`, 0 off the loss mask.

    Without values an answer's reward is spread over its tokens (V = 0), and a truncated one ends like any other. With them
    the value after the last token stands for what a truncated answer was not given the time to earn.

    Args:
        rewards: (T,) of `token_rewards`.
        batch: on the CPU; a `ScoredBatch` where there is a critic.
        discount: gamma.
        gae_lambda: lambda.
    """
    starts, sequence = loss_cu_seqlens(batch), torch.arange(batch.n_seqs)
    values = torch.zeros(int(starts[-1]) + batch.n_seqs, dtype=torch.float64)
    truncated = torch.zeros(batch.n_seqs, dtype=torch.bool)
    if isinstance(batch, ScoredBatch) and batch.values is not None and batch.last_values is not None:
        values[torch.arange(int(starts[-1])) + torch.repeat_interleave(sequence, starts.diff())] = batch.values[batch.loss_mask]
        values[starts[1:] + sequence] = batch.last_values
        truncated = batch.truncated
    chosen = rewards.double()[batch.loss_mask]
    advantages, returns = gae(chosen, values, starts, truncated, discount=discount, gae_lambda=gae_lambda)
    return _on_mask(advantages, batch), _on_mask(returns, batch)


def _on_mask(values: Tensor, batch: Batch) -> Tensor:
    return torch.zeros(len(batch.loss_mask), dtype=values.dtype).masked_scatter_(batch.loss_mask, values)
