"""Advantages: from one score an answer to one number a token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["group", "batch"]


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, truncated: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) on flat sequences.

        d_t = r_t + discount * V_{t+1} - V_t
        A_t = d_t + discount * gae_lambda * A_{t+1}
        returns = A + V

    The value after a sequence's last token counts only where the answer was truncated: an ended answer has no future.
    Pass only the tokens that the policy produced; the advantage then carries over the others.

    Args:
        rewards: (T,) of S sequences end to end.
        values: (T + S,), one more entry for each sequence: the value after its last token.
        cu_seqlens: (S + 1,) int, where each sequence starts in `rewards`.
        truncated: (S,) bool.
        discount: gamma.
        gae_lambda: lambda.

    Returns:
        (T,) advantages and (T,) returns, in the type of `rewards`, computed in float64.
    """
    starts = cu_seqlens.to(torch.int64)
    lengths = starts.diff()
    n_tokens, n_seqs = len(rewards), len(lengths)
    if len(values) != n_tokens + n_seqs or len(truncated) != n_seqs:
        raise ValueError(f"{n_tokens} rewards in {n_seqs} sequences need {n_tokens + n_seqs} values, got {len(values)}")
    sequence = torch.repeat_interleave(torch.arange(n_seqs, device=rewards.device), lengths)
    token = torch.arange(n_tokens, device=rewards.device)
    last = token == starts[1:][sequence] - 1
    v = values.double()
    v_now, v_next = v[token + sequence], v[token + sequence + 1]
    v_next = torch.where(last & ~truncated.bool()[sequence], 0.0, v_next)
    deltas = rewards.double() + discount * v_next - v_now
    advantages = _discounted_sums(deltas, starts[1:][sequence], discount * gae_lambda, int(lengths.max()) if n_seqs else 0)
    return advantages.to(rewards.dtype), (advantages + v_now).to(rewards.dtype)


def _discounted_sums(deltas: Tensor, ends: Tensor, factor: float, longest: int) -> Tensor:
    """sum_k factor^k deltas[t + k] up to each token's sequence end."""
    if factor == 1.0:
        onward = torch.cat([deltas.flip(0).cumsum(0).flip(0), deltas.new_zeros(1)])
        return onward[:-1] - onward[ends]
    # by doubling: after n rounds a sum spans 2^n tokens
    sums, token = deltas.clone(), torch.arange(len(deltas), device=deltas.device)
    span = 1
    while span < longest:
        reach = torch.where(token + span < ends, 1.0, 0.0).to(deltas.dtype)[:-span]
        ahead = sums[span:] * reach
        sums = torch.cat([sums[:-span].add(ahead, alpha=factor**span), sums[-span:]])
        span *= 2
    return sums


def normalize(
    values: Tensor,
    group_ids: Tensor,
    *,
    mean_level: Level | None,
    std_level: Level | None,
    leave_one_out: bool = False,
    unbiased: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """(values - mean) / (std + eps), mean and spread each over the group, the batch, or not at all.

    GRPO is ("group", "group"), Dr. GRPO ("group", None), RLOO ("group", None, leave_one_out).

    Args:
        values: (N,) scores.
        group_ids: (N,) int, equal within a group.
        mean_level: over what the mean is taken; None subtracts nothing.
        std_level: over what the standard deviation is taken; None divides by nothing. It is about the plain mean of its level.
        leave_one_out: each value is compared with the mean of the others.
        unbiased: divide the variance by n - 1.
        eps: added to the standard deviation.

    Raises:
        ValueError: `leave_one_out` with a single value.
    """
    x = values.double()
    result = x
    if mean_level is not None:
        groups, counts = _groups(group_ids, mean_level)
        others = counts - 1 if leave_one_out else counts
        if leave_one_out and bool((counts < 2).any()):
            raise ValueError("leave_one_out compares a value with the others of its group, so a group needs at least 2 values")
        sums = torch.zeros_like(counts).index_add_(0, groups, x)[groups]
        result = x - (sums - x if leave_one_out else sums) / others[groups]
    if std_level is not None:
        groups, counts = _groups(group_ids, std_level)
        mean = torch.zeros_like(counts).index_add_(0, groups, x) / counts
        squares = torch.zeros_like(counts).index_add_(0, groups, (x - mean[groups]) ** 2)
        variance = squares / (counts - 1 if unbiased else counts).clamp(min=1)
        result = result / (variance.sqrt()[groups] + eps)
    return result.to(values.dtype)


def _groups(group_ids: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """(N,) dense group numbers and the (G,) float64 sizes of the groups."""
    ids = group_ids if level == "group" else torch.zeros_like(group_ids)
    _, groups, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    return groups, counts.double()


def scale_rewards(rewards: Tensor, *, bias: float, scaling: float, clip: float) -> Tensor:
    """Scores: clip((rewards - bias) * scaling, -clip, clip)."""
    return ((rewards - bias) * scaling).clamp(-clip, clip)
