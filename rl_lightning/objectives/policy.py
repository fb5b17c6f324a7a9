"""ppo_loss: the clipped policy objective, decoupled from the policy that sampled."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rl_lightning.objectives.aggregation import Aggregation, aggregate
from rl_lightning.objectives.choice import check_choice
from rl_lightning.objectives.corrections import Correction, importance_weights
from rl_lightning.objectives.sequences import Sequences

Surrogate = Literal["ppo", "gspo", "cispo"]


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
    behav_imp_weight_floor: float | None = None,
    surrogate: Surrogate = "ppo",
    correction: Correction = "decoupled",
    m2_threshold: float = 0.04,
    aggregation: Aggregation = "token-mean",
    keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO (arXiv 1707.06347), decoupled (arXiv 2110.00641, Eq. 5 of arXiv 2505.24298) where `prox_logprobs` is given.

        base = p, or o without prox_logprobs
        r    = exp(n - base)
        L    = max(-A r, -A clip(r, 1 - eps_clip, 1 + eps_clip_high))
        L    = min(L, c_clip |A|)                       if c_clip (dual clip, acts where A < 0)
        L    = L w,  w = exp(p - o) without gradient    if decoupled; w = 0 where w > behav_imp_weight_cap
        loss = sum(L m) / normalizer

    Other surrogates:

        gspo   r = exp(mean(n - base)) and mean(A) over each answer's loss tokens, for all of them (arXiv 2507.18071)
        cispo  L = -clip(r, 1 - eps_clip, 1 + eps_clip_high) A n, no gradient through the clipped r (arXiv 2506.13585)

    Other treatments of w are in `importance_weights`, other sums over tokens in `token_weights`.

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
        behav_imp_weight_floor: the same for a smaller weight, where the correction has two bounds.
        surrogate: what is maximised.
        correction: what is done with w.
        m2_threshold: of the correction m2po.
        aggregation: how much each token counts.
        keep: (T,) bool, all other tokens are dropped like those over the cap. With m2po it takes the place of its selection,
            which is about a whole minibatch: `m2_keep`.
        cu_seqlens: (S + 1,) int, where each sequence starts; for gspo, sequence-mask and all aggregations but token-mean.
        normalizer: what the sum is divided by: that of the whole minibatch where it is cut into micro-batches or over ranks, so
            that the parts' losses add up. Loss tokens for token-mean, otherwise sequences with a loss token, for token-sum-norm
            times a constant. What `denominator` says of the tokens given here if None.

    Returns:
        The scalar loss and detached (T,) tensors, 0 off the mask, whose mean over loss tokens is the statistic of that name:
        `importance_weight` r, `approx_kl` n - base, `actor_clip_ratio` and `dual_clip_ratio` (1 where clipping is active), and
        if decoupled `behave_imp_weight` w as it enters the loss, `behave_approx_kl` p - o, `behave_cap_ratio` (1 where the
        correction dropped the token) and, with tis, `behave_truncated_ratio` (1 where w was over the cap).

    Raises:
        ValueError: options that do not go together, or that need `cu_seqlens` or `prox_logprobs` that are not given.
    """
    check_choice("surrogate", surrogate, get_args(Surrogate))
    _check_combinations(surrogate, correction, c_clip, keep, decoupled=prox_logprobs is not None)
    base = behav_logprobs if prox_logprobs is None else prox_logprobs
    log_ratio = torch.where(loss_mask, logprobs - base.detach(), 0.0)
    ratio, advantages = log_ratio.exp(), torch.where(loss_mask, advantages, 0.0)
    if surrogate == "gspo":
        sequences = Sequences(loss_mask, cu_seqlens, needed_by=f"surrogate={surrogate}")
        ratio, advantages = sequences.means(log_ratio).exp(), sequences.means(advantages)
    bounds = (1 - eps_clip, 1 + (eps_clip if eps_clip_high is None else eps_clip_high))
    loss, is_clipped = _clipped(ratio, advantages, logprobs, bounds, surrogate)
    loss, is_bounded = _dual_clipped(loss, advantages, c_clip)
    stats = {"importance_weight": ratio, "approx_kl": log_ratio, "actor_clip_ratio": is_clipped, "dual_clip_ratio": is_bounded}
    if prox_logprobs is not None:
        weight, dropped = importance_weights(
            prox_logprobs,
            behav_logprobs,
            loss_mask,
            correction=correction,
            cap=behav_imp_weight_cap,
            floor=behav_imp_weight_floor,
            m2_threshold=m2_threshold,
            keep=keep,
            cu_seqlens=cu_seqlens,
        )
        loss = torch.where(dropped, 0.0, loss * weight)
        gap = prox_logprobs - behav_logprobs
        stats |= {"behave_imp_weight": weight, "behave_approx_kl": gap, "behave_cap_ratio": dropped}
        if correction == "tis" and behav_imp_weight_cap is not None:
            stats["behave_truncated_ratio"] = gap.exp() > behav_imp_weight_cap
    total = aggregate(loss, loss_mask, cu_seqlens, aggregation=aggregation, normalizer=normalizer)
    return total, {name: torch.where(loss_mask, value.detach().to(logprobs.dtype), 0.0) for name, value in stats.items()}


def _check_combinations(
    surrogate: Surrogate, correction: Correction, c_clip: float | None, keep: Tensor | None, *, decoupled: bool
) -> None:
    if surrogate == "cispo" and c_clip is not None:
        raise ValueError(f"c_clip={c_clip} bounds a ratio that surrogate=cispo clips itself: leave it at null")
    if not decoupled and (correction != "decoupled" or keep is not None):
        raise ValueError(f"correction={correction} and keep are about the weight of prox_logprobs: give these, or neither")


def _clipped(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, bounds: tuple[float, float], surrogate: Surrogate
) -> tuple[Tensor, Tensor]:
    """(T,) losses, and where clipping the ratio to the bounds makes them what they are."""
    clipped_ratio = ratio.clamp(*bounds)
    if surrogate == "cispo":
        return -clipped_ratio.detach() * advantages * logprobs, clipped_ratio != ratio
    free, clipped = -advantages * ratio, -advantages * clipped_ratio
    return torch.maximum(free, clipped), clipped > free


def _dual_clipped(loss: Tensor, advantages: Tensor, c_clip: float | None) -> tuple[Tensor, Tensor]:
    """(T,) losses of at most c_clip |A|, and where that acts."""
    if c_clip is None:
        return loss, torch.zeros_like(loss, dtype=torch.bool)
    bound = c_clip * advantages.abs()
    return torch.minimum(loss, bound), loss > bound
