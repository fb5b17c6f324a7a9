"""PolicyObjective: what PPO optimises, as methods to override."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rl_lightning.modules.credit import assign_credit, token_rewards
from rl_lightning.modules.hyperparameters import as_config
from rl_lightning.modules.language_model import LanguageModule
from rl_lightning.modules.policy_batch import LossTokens
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.modules.scored_batch import ScoredBatch
from rl_lightning.objectives.advantages import scale_rewards
from rl_lightning.objectives.corrections import approximate_prox
from rl_lightning.objectives.kl import adapt_kl_ctl, kl_estimate
from rl_lightning.objectives.overlong import overlong_penalty
from rl_lightning.objectives.policy import ppo_loss
from rl_lightning.types import Batch


class PolicyObjective(LanguageModule):
    """The base of `AsyncPPOModule`: losses, advantages and returns. When they are asked for, the subclass says.

    Args:
        path: folder or hub name of the model.
        ppo: what is optimised.
        **options: of `LanguageModule`.

    Attributes:
        kl_ctl: weight of the KL penalty in the present step.
        max_new_tokens: most tokens of an answer, known from the data when training starts.
    """

    def __init__(self, path: str, ppo: PPOConfig = PPOConfig(), **options: Any) -> None:
        super().__init__(path, **options)
        self.ppo = as_config(PPOConfig, ppo)
        self.kl_ctl = self.ppo.kl_ctl
        self.max_new_tokens: int | None = None

    # -- to override

    def policy_loss(self, logprobs: Tensor, tokens: LossTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of one micro-batch in the loss of its minibatch.

        Args:
            logprobs: (M,) of the sampled tokens under the present weights, with gradient.
            tokens: everything else about them.

        Returns:
            A scalar: the sum over tokens divided by `tokens.normalizer`; and detached (M,) tensors, whose mean over all loss
            tokens of the step is logged under their names.
        """
        ppo, prox = self.ppo, tokens.prox_logprobs
        if ppo.prox == "a3po":
            prox = approximate_prox(logprobs, tokens.behav_logprobs, tokens.versions, version=tokens.version)
        return ppo_loss(
            logprobs,
            tokens.behav_logprobs,
            tokens.advantages,
            tokens.loss_mask,
            prox_logprobs=prox if ppo.use_decoupled_loss else None,
            eps_clip=ppo.eps_clip,
            eps_clip_high=ppo.eps_clip_high,
            c_clip=ppo.c_clip,
            behav_imp_weight_cap=ppo.behav_imp_weight_cap,
            behav_imp_weight_floor=ppo.behav_imp_weight_floor,
            surrogate=ppo.surrogate,
            correction=ppo.correction,
            m2_threshold=ppo.m2_threshold,
            aggregation=ppo.aggregation,
            keep=tokens.keep,
            cu_seqlens=tokens.cu_seqlens,
            normalizer=tokens.normalizer,
        )

    def compute_advantages(self, batch: Batch) -> Tensor:
        """(T,) advantages of the batch's tokens, as they enter the loss; off the loss mask they do not matter.

        The default takes baseline and spread from the scores as `ppo.advantage` says, spreads each answer's score and its
        tokens' KL penalties over its tokens, and normalises as configured. A collective: called on all ranks once a step.

        Args:
            batch: on the CPU; in training a `ScoredBatch`, with what reference and critic say.
        """
        scores = self.ppo.estimator.normalize_scores(self.scores(batch), batch.group_ids)
        advantages = self.spread(scores, batch)
        return self.normalize_over_batch(advantages, batch.loss_mask) if self.ppo.normalizes_over_batch else advantages

    def compute_returns(self, batch: Batch) -> Tensor:
        """(T,) float64: what the critic learns to say of the state in which each token was chosen, on the scale of rewards."""
        return self.assign_credit(self.scores(batch), batch)[1]

    # -- pieces of the default

    def scores(self, batch: Batch) -> Tensor:
        """(S,) scaled and clipped rewards, less an overlong answer's penalty; 0 for a truncated answer where so configured."""
        ppo, rewards = self.ppo, batch.rewards
        if ppo.overlong_buffer is not None and self.max_new_tokens is not None:
            rewards = rewards + overlong_penalty(
                batch.cu_seqlens.diff() - batch.prompt_lens,
                max_new_tokens=self.max_new_tokens,
                buffer=ppo.overlong_buffer,
                penalty=ppo.overlong_penalty,
            )
        scores = scale_rewards(rewards, bias=ppo.reward_output_bias, scaling=ppo.reward_output_scaling, clip=ppo.max_reward_clip)
        return torch.where(batch.truncated, 0.0, scores) if ppo.mask_no_eos_with_zero else scores

    def kl(self, batch: Batch) -> Tensor | None:
        """(T,) float64 estimates of the KL between what sampled and the reference, NaN off the loss mask; None without one."""
        if not isinstance(batch, ScoredBatch) or batch.ref_logprobs is None:
            return None
        return kl_estimate(batch.behav_logprobs.double(), batch.ref_logprobs, estimator=self.ppo.kl_estimator)

    def penalties(self, batch: Batch) -> Tensor | None:
        """(T,) what each token's KL costs now; None without a reference."""
        kl = self.kl(batch)
        return None if kl is None else self.kl_ctl * kl

    def spread(self, scores: Tensor, batch: Batch) -> Tensor:
        """(T,): each answer's score at its last loss token, less its KL penalties, carried back by discount and lambda."""
        return self.assign_credit(scores, batch)[0].float()

    def assign_credit(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(T,) float64 advantages before they are normalised, and returns; by GAE with a critic, with V = 0 without."""
        rewards = token_rewards(scores, batch, self.penalties(batch))
        return assign_credit(rewards, batch, discount=self.ppo.discount, gae_lambda=self.ppo.gae_lambda)

    def normalize_over_batch(self, values: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
        """(T,) `values` to mean 0 and spread 1 over the masked tokens of all ranks, biased, in float64. A collective."""
        chosen = values[mask].double()
        count, total = self.ranks.sum(torch.stack([mask.sum().double(), chosen.sum()]), self.device).tolist()
        mean = total / max(count, 1.0)
        variance = float(self.ranks.sum((chosen - mean).square().sum(), self.device)) / max(count, 1.0)
        return ((values.double() - mean) / (math.sqrt(variance) + eps)).float()

    def loss_normalizer(self, counts: Tensor) -> float:
        """What a minibatch's sum over tokens is divided by, as `ppo.aggregation` says; a loss finds it in its `tokens`.

        Args:
            counts: (2,) loss tokens of the minibatch on all ranks, and answers that have any.
        """
        n_tokens, n_answers = counts.clamp(min=1).tolist()
        if self.ppo.aggregation == "token-mean":
            return n_tokens
        if self.ppo.aggregation == "token-sum-norm":
            divisor = self.ppo.token_sum_norm or self.max_new_tokens
            assert divisor is not None, "check_data comes before"
            return n_answers * divisor
        return n_answers

    def adapt_kl(self, kl: float, n_answers: int) -> None:
        """Sets the penalty's weight for the next step, where it adapts.

        Args:
            kl: of this step's answers to the reference, their mean over all ranks.
            n_answers: of this step on all ranks.
        """
        if self.ppo.use_adaptive_kl_ctl and math.isfinite(kl):
            options = {"target": self.ppo.adaptive_kl_target, "horizon": self.ppo.adaptive_kl_horizon}
            self.kl_ctl = adapt_kl_ctl(self.kl_ctl, kl, n_sequences=n_answers, **options)
