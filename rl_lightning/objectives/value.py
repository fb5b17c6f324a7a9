"""value_loss: the clipped objective of the critic."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lightning.objectives.aggregation import aggregate


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    value_eps_clip: float,
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error to the returns, clipped around the values before this batch's updates (arXiv 1707.06347, 2005.12729).

        V_clip = V_old + clip(V - V_old, -value_eps_clip, value_eps_clip)
        L      = max((V - R)^2 / 2, (V_clip - R)^2 / 2)
        loss   = sum(L m) / normalizer

    Args:
        values: (T,) V, of the critic that is trained.
        old_values: (T,) V_old, before this batch's updates.
        returns: (T,) R, on the same scale as the values.
        loss_mask: (T,) bool m; what the other tensors hold where it is false does not matter.
        value_eps_clip: how far a value may move to either side, positive.
        normalizer: loss tokens of the whole minibatch, as in `ppo_loss`. The tokens given here if None.

    Returns:
        The scalar loss and detached (T,) tensors, 0 off the mask, whose mean over loss tokens is the statistic of that name:
        `value_clip_ratio` (1 where the clipped term is the larger) and `value_error` (V - R)^2.

    Raises:
        ValueError: a clip range that is not positive.
    """
    if value_eps_clip <= 0:
        raise ValueError(f"value_eps_clip={value_eps_clip} must be positive")
    error = torch.where(loss_mask, values - returns.detach(), 0.0)
    move = torch.where(loss_mask, values - old_values.detach(), 0.0)
    excess = move - move.clamp(-value_eps_clip, value_eps_clip)  # exactly 0 within the range: rounding is no clip
    free, clipped = error.square() / 2, (error - excess).square() / 2
    stats = {"value_clip_ratio": (clipped > free).to(values.dtype), "value_error": error.detach().square()}
    loss = aggregate(torch.maximum(free, clipped), loss_mask, None, aggregation="token-mean", normalizer=normalizer)
    return loss, stats
