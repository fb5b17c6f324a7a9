"""aggregate: from one loss a token to the loss of many answers."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rl_lightning.objectives.choice import check_choice
from rl_lightning.objectives.sequences import Sequences

Aggregation = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "token-sum-norm"]


def aggregate(
    losses: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor | None,
    *,
    aggregation: Aggregation,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """The scalar sum(losses * token_weights) / normalizer, in the type of `losses`.

    Args:
        losses: (T,); what it holds off the mask does not matter.
        loss_mask: (T,) bool.
        cu_seqlens: (S + 1,) int, where each sequence starts; token-mean does without.
        aggregation: which of those of `token_weights`.
        normalizer: of the whole minibatch, so that the parts of one add up; the `denominator` of these tokens if None.

    Raises:
        ValueError: another name, or no `cu_seqlens` where they are needed.
    """
    weights = token_weights(loss_mask, cu_seqlens, aggregation=aggregation).to(losses.dtype)
    if normalizer is None:
        normalizer = denominator(loss_mask, cu_seqlens, aggregation=aggregation)
    total = (torch.where(loss_mask, losses, 0.0) * weights).sum()
    return (total / normalizer).to(losses.dtype)


def token_weights(loss_mask: Tensor, cu_seqlens: Tensor | None, *, aggregation: Aggregation) -> Tensor:
    """Weights with which loss = sum(L * token_weights) / normalizer, each a function of the token's own sequence only.

        token-mean                1,            over all loss tokens (DAPO, arXiv 2503.14476)
        sequence-mean-token-mean  1 / length,   over the sequences with a loss token (GRPO, arXiv 2402.03300)
        sequence-mean-token-sum   1,            over the sequences with a loss token
        token-sum-norm            1,            over these sequences times a constant (Dr. GRPO, arXiv 2503.20783)

    Args:
        loss_mask: (T,) bool.
        cu_seqlens: (S + 1,) int, where each sequence starts; token-mean does without.
        aggregation: which of them.

    Returns:
        (T,) float64, 0 off the mask. Length is the number of a sequence's loss tokens.

    Raises:
        ValueError: another name, or no `cu_seqlens` where they are needed.
    """
    check_choice("aggregation", aggregation, get_args(Aggregation))
    mask = loss_mask.double()
    if aggregation == "token-mean":
        return mask
    sequences = Sequences(loss_mask, cu_seqlens, needed_by=f"aggregation={aggregation}")
    if aggregation == "sequence-mean-token-mean":
        return mask / sequences.spread(sequences.counts).clamp(min=1)
    return mask


def denominator(loss_mask: Tensor, cu_seqlens: Tensor | None, *, aggregation: Aggregation) -> Tensor:
    """The normalizer of these tokens where they are a whole minibatch.

    Loss tokens for token-mean, otherwise the sequences with at least one of them; for token-sum-norm times the loss tokens of
    the longest. All but the last add up over micro-batches and ranks. Arguments and errors are those of `token_weights`.

    Returns:
        Float64 scalar, at least 1.
    """
    check_choice("aggregation", aggregation, get_args(Aggregation))
    if aggregation == "token-mean":
        return loss_mask.sum().double().clamp(min=1)
    counts = Sequences(loss_mask, cu_seqlens, needed_by=f"aggregation={aggregation}").counts
    total = (counts > 0).sum().double()
    if aggregation == "token-sum-norm" and len(counts):
        total = total * counts.max()
    return total.clamp(min=1)
