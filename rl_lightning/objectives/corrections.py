"""importance_weights: what makes up for tokens that an older policy sampled."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rl_lightning.objectives.choice import check_choice
from rl_lightning.objectives.sequences import Sequences

Correction = Literal["decoupled", "tis", "icepop", "sequence-mask", "m2po"]

NEEDED_BOUNDS = {"decoupled": (), "tis": ("cap",), "icepop": ("cap", "floor"), "sequence-mask": ("cap", "floor"), "m2po": ()}
"""The bounds that a correction cannot do without. Beside these only decoupled takes one, the cap."""


def importance_weights(
    prox_logprobs: Tensor,
    behav_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    correction: Correction,
    cap: float | None = None,
    floor: float | None = None,
    m2_threshold: float = 0.04,
    keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight w = exp(p - o) of each token, without gradient, and the tokens that it drops.

        decoupled      dropped where w > cap, if there is one (arXiv 2505.24298)
        tis            min(w, cap), nothing dropped (arXiv 1802.01561)
        icepop         dropped unless floor <= w <= cap (arXiv 2510.18855)
        sequence-mask  a whole answer dropped unless floor <= exp(mean(p - o)) <= cap over its loss tokens
        m2po           dropped unless `m2_keep` (arXiv 2510.01161)

    Args:
        prox_logprobs: (T,) p, under the weights before this batch's updates.
        behav_logprobs: (T,) o, as the engine reported them.
        loss_mask: (T,) bool; what the other tensors hold where it is false does not matter.
        correction: which of them.
        cap: largest weight, the option `behav_imp_weight_cap`.
        floor: smallest weight, the option `behav_imp_weight_floor`.
        m2_threshold: of m2po, as in `m2_keep`.
        keep: (T,) bool, all other tokens are dropped too. With m2po it takes the place of the selection: that looks at a whole
            minibatch, so whoever cuts one makes it beforehand.
        cu_seqlens: (S + 1,) int, where each sequence starts; only sequence-mask needs it.

    Returns:
        (T,) weights, 0 where dropped and off the mask, and (T,) bool, the dropped tokens. They leave the sum of a loss but not
        its denominator.

    Raises:
        ValueError: another name, bounds that the correction lacks or does not know, no `cu_seqlens` where needed.
    """
    check_bounds(correction, cap=cap, floor=floor)
    gap = torch.where(loss_mask, prox_logprobs - behav_logprobs, 0.0).detach()
    weight = bounded = gap.exp()
    dropped = torch.zeros_like(loss_mask)
    if correction == "sequence-mask":
        bounded = Sequences(loss_mask, cu_seqlens, needed_by=f"correction={correction}").means(gap).exp()
    if correction == "m2po" and keep is None:
        keep = m2_keep(prox_logprobs, behav_logprobs, loss_mask, threshold=m2_threshold)
    if correction == "tis":
        weight = weight.clamp(max=cap)
    else:
        dropped = _outside(bounded, floor, cap)
    if keep is not None:
        dropped = dropped | ~keep
    dropped = dropped & loss_mask
    return torch.where(loss_mask & ~dropped, weight, 0.0), dropped


def check_bounds(correction: Correction, *, cap: float | None, floor: float | None) -> None:
    """Refuses bounds that a correction lacks or does not know.

    Raises:
        ValueError: names the correction and the bounds.
    """
    check_choice("correction", correction, get_args(Correction))
    needed = NEEDED_BOUNDS[correction]
    for name, value in (("cap", cap), ("floor", floor)):
        if value is None and name in needed:
            raise ValueError(f"correction={correction} needs behav_imp_weight_{name}: set it, or choose correction=decoupled")
        if value is not None and name not in needed and (correction, name) != ("decoupled", "cap"):
            raise ValueError(f"correction={correction} makes no use of behav_imp_weight_{name}={value}: leave it at null")
    if cap is not None and floor is not None and floor > cap:
        raise ValueError(f"behav_imp_weight_floor={floor} lies above behav_imp_weight_cap={cap}, dropping every token: swap them")


def m2_keep(prox_logprobs: Tensor, behav_logprobs: Tensor, loss_mask: Tensor, *, threshold: float) -> Tensor:
    """M2PO's selection (arXiv 2510.01161): drops the tokens with the largest (o - p)^2 until the rest's mean is small enough.

    Args:
        prox_logprobs: (T,) p, of a whole minibatch.
        behav_logprobs: (T,) o.
        loss_mask: (T,) bool; what the other tensors hold where it is false does not matter.
        threshold: largest mean of (o - p)^2 over the kept tokens.

    Returns:
        (T,) bool, true on the kept tokens. Of equal tokens the earlier ones are kept.

    Raises:
        ValueError: a negative threshold.
    """
    if threshold < 0:
        raise ValueError(f"m2_threshold={threshold} bounds a mean of squares and must not be negative")
    tokens = loss_mask.nonzero().squeeze(-1)
    squares = (behav_logprobs[tokens] - prox_logprobs[tokens]).detach().double().square()
    ascending, order = squares.sort(stable=True)
    ranks = torch.arange(1, len(tokens) + 1, device=tokens.device)
    kept = tokens[order[ascending.cumsum(0) <= threshold * ranks]]
    return torch.zeros_like(loss_mask).index_fill_(0, kept, True)


def approximate_prox(logprobs: Tensor, behav_logprobs: Tensor, versions: Tensor, *, version: int) -> Tensor:
    """pi_prox between the policy that sampled a token and the present one, by the token's age: A-3PO (arXiv 2512.06547).

        p = o + a (n - o),  a = clamp((version - v) / (version + 1 - v), 0, 1)

    A token of the trainer's own version has p = o; the older it is, the nearer p comes to n. No forward pass is needed.

    Args:
        logprobs: (T,) n, under the weights that are trained.
        behav_logprobs: (T,) o, as the engine reported them.
        versions: (T,) int, v, of the weights that sampled each token.
        version: of the weights before this batch's updates, which lead to version + 1.

    Returns:
        (T,) in the type of `logprobs`, without gradient. What the arguments hold off a loss mask stays off it.
    """
    age = (version - versions).to(logprobs.dtype).clamp(min=0)
    return torch.lerp(behav_logprobs.to(logprobs.dtype), logprobs.detach(), age / (age + 1))


def _outside(values: Tensor, floor: float | None, cap: float | None) -> Tensor:
    """Where values lie out of bounds. NaN does not: a broken number shows in the loss instead of leaving it."""
    outside = torch.zeros_like(values, dtype=torch.bool)
    if floor is not None:
        outside = outside | (values < floor)
    if cap is not None:
        outside = outside | (values > cap)
    return outside
