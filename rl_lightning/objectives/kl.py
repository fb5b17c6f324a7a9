"""kl_estimate: how far the policy is from a reference, token by token; adapt_kl_ctl: what that should cost."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rl_lightning.objectives.choice import check_choice

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KLEstimator) -> Tensor:
    """KL(policy, reference) of each token from its sample (J. Schulman, "Approximating KL divergence", 2020).

        k1 = o - ref                       unbiased, of either sign
        k2 = (o - ref)^2 / 2               biased, never negative
        k3 = exp(ref - o) - 1 - (ref - o)  unbiased, never negative

    Args:
        logprobs: (T,) o, of the policy that sampled the tokens.
        ref_logprobs: (T,) of the reference.
        estimator: which of the three.

    Returns:
        (T,) in the type of `logprobs`, with its gradient. What the arguments hold off a loss mask stays off it.

    Raises:
        ValueError: another name.
    """
    check_choice("kl_estimator", estimator, get_args(KLEstimator))
    gap = logprobs - ref_logprobs
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return gap.square() / 2
    return torch.expm1(-gap) + gap


def adapt_kl_ctl(kl_ctl: float, kl: float, *, target: float, horizon: float, n_sequences: int) -> float:
    """The KL penalty's weight after a step that trained on `n_sequences` answers (arXiv 1909.08593, section 2.2).

        kl_ctl * (1 + clip(kl / target - 1, -0.2, 0.2) * n_sequences / horizon)

    Args:
        kl_ctl: the weight during the step.
        kl: mean over the step's answers of their KL to the reference, summed over tokens.
        target: the KL to hold, positive.
        horizon: answers over which the weight may change by a fifth, positive.
        n_sequences: answers of the step, over all ranks.

    Raises:
        ValueError: a target or horizon that is not positive.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"adaptive_kl_target={target} and adaptive_kl_horizon={horizon} must be positive")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_ctl * (1 + error * n_sequences / horizon)
