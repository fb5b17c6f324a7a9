"""ppo_loss: the clipped policy objective, decoupled from the policy that sampled."""

from __future__ import annotations

import torch
from torch import Tensor


def ppo_loss(
    logprobs: Tensor,
    behav_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    prox_logprobs: Tensor | None = None,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    c_clip: float | None = None,
    behav_imp_weight_cap: float | None = None,
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO (arXiv 1707.06347), decoupled (arXiv 2110.00641, Eq. 5 of arXiv 2505.24298) where `prox_logprobs` is given.

        base = p, or o without prox_logprobs
        r    = exp(n - base)
        L    = max(-A r, -A clip(r, 1 - eps_clip, 1 + eps_clip_high))
        L    = min(L, c_clip |A|)                       if c_clip (dual clip, acts where A < 0)
        L    = L w,  w = exp(p - o) without gradient    if decoupled; w = 0 where w > behav_imp_weight_cap
        loss = sum(L m) / normalizer

    Args:
        logprobs: (T,) n, under the weights that are trained.
        behav_logprobs: (T,) o, as the engine reported them.
        advantages: (T,) A.
        loss_mask: (T,) bool m; what the other tensors hold where it is false does not matter.
        prox_logprobs: (T,) p, under the weights before this batch's updates.
        eps_clip: how far the ratio may fall.
        eps_clip_high: how far it may rise (DAPO); `eps_clip` if None.
        c_clip: above 1, bounds the loss of unlikely answers with a negative advantage.
        behav_imp_weight_cap: tokens with a larger weight w leave the sum, not the normalizer.
        normalizer: what the sum is divided by: the loss tokens of the whole minibatch where it is cut into micro-batches
            or over ranks, so that the parts' losses add up. The tokens given here if None.

    Returns:
        The scalar loss and detached (T,) tensors, 0 off the mask, whose mean over loss tokens is the statistic of that name:
        `importance_weight` r, `approx_kl` n - base, `actor_clip_ratio` and `dual_clip_ratio` (1 where clipping is active), and
        if decoupled `behave_imp_weight` w, `behave_approx_kl` p - o, `behave_cap_ratio` (1 where w was over the cap).
    """
    decoupled = prox_logprobs is not None
    base = behav_logprobs if prox_logprobs is None else prox_logprobs
    log_ratio = torch.where(loss_mask, logprobs - base.detach(), 0.0)
    ratio = log_ratio.exp()
    advantages = torch.where(loss_mask, advantages, 0.0)
    clipped_ratio = ratio.clamp(1 - eps_clip, 1 + (eps_clip if eps_clip_high is None else eps_clip_high))
    free, clipped = -advantages * ratio, -advantages * clipped_ratio
    loss = torch.maximum(free, clipped)
    stats = {"importance_weight": ratio, "approx_kl": log_ratio, "actor_clip_ratio": clipped > free}
    stats["dual_clip_ratio"] = torch.zeros_like(loss_mask)
    if c_clip is not None:
        bound = c_clip * advantages.abs()
        stats["dual_clip_ratio"] = loss > bound
        loss = torch.minimum(loss, bound)
    if decoupled:
        gap = torch.where(loss_mask, base - behav_logprobs, 0.0).detach()
        weight, over = gap.exp(), torch.zeros_like(loss_mask)
        if behav_imp_weight_cap is not None:
            over = weight > behav_imp_weight_cap
            weight = torch.where(over, 0.0, weight)
        loss = torch.where(over, 0.0, loss * weight)
        stats |= {"behave_imp_weight": weight, "behave_approx_kl": gap, "behave_cap_ratio": over}
    if normalizer is None:
        normalizer = loss_mask.sum().clamp(min=1)
    total = torch.where(loss_mask, loss, 0.0).sum() / normalizer
    return total, {name: torch.where(loss_mask, value.detach().to(logprobs.dtype), 0.0) for name, value in stats.items()}
