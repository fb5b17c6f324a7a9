"""ScoredBatch: a rollout batch with what the models beside the actor say about it, before anything is updated."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rl_lightning.types import Batch


@dataclass(frozen=True, slots=True)
class ScoredBatch(Batch):
    """A batch of T tokens and S sequences on the CPU; the further tensors are float64, and None where there is no such model.

    Attributes:
        ref_logprobs: (T,) log-probabilities under the reference, NaN off the loss mask.
        values: (T,) the critic's value of the state in which each token was chosen, NaN off the loss mask.
        last_values: (S,) the value after an answer's last token; 0 where the answer ended by itself.
    """

    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    last_values: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, **scores: Tensor | None) -> ScoredBatch:
        """`batch` with `scores`."""
        own: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return cls(**{**own, **scores})


def loss_cu_seqlens(batch: Batch) -> Tensor:
    """(S + 1,) int64: where each sequence's loss tokens start among all loss tokens of `batch`."""
    total = torch.zeros(len(batch.loss_mask) + 1, dtype=torch.int64)
    torch.cumsum(batch.loss_mask, 0, out=total[1:])
    return total[batch.cu_seqlens.long()]


def with_end_tokens(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
    """Puts a token to score after each truncated answer: what predicts it is the answer's last token, which is not run otherwise.

    Returns:
        A batch that is good for forward passes only; (T,) where the tokens of `batch` stand in it; (S,) where the new tokens
        stand, -1 for answers without one: those that ended, and those of which nothing is in the loss.
    """
    cut = batch.truncated & (loss_cu_seqlens(batch).diff() > 0)
    old_starts, lengths = batch.cu_seqlens.long(), batch.cu_seqlens.long().diff()
    starts = torch.zeros_like(old_starts)
    torch.cumsum(lengths + cut, 0, out=starts[1:])
    tokens = torch.arange(int(old_starts[-1])) + torch.repeat_interleave((starts - old_starts)[:-1], lengths)
    token_ids = torch.zeros(int(starts[-1]), dtype=batch.token_ids.dtype).index_copy_(0, tokens, batch.token_ids)
    loss_mask = torch.ones(int(starts[-1]), dtype=torch.bool).index_copy_(0, tokens, batch.loss_mask)
    longer = replace(batch, token_ids=token_ids, loss_mask=loss_mask, cu_seqlens=starts.to(batch.cu_seqlens.dtype))
    return longer, tokens, torch.where(cut, starts[1:] - 1, -1)
