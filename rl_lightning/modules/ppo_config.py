"""PPOConfig: the options of the policy objective, under AReaL's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOT_YET: dict[str, tuple[Any, str]] = {
    "disable_value": (True, "a critic"),
    "kl_ctl": (0.0, "a reference model"),
    "use_adaptive_kl_ctl": (False, "a reference model"),
    "value_eps_clip": (0.2, "a critic"),
    "adaptive_kl_target": (6.0, "a reference model"),
    "adaptive_kl_horizon": (10000.0, "a reference model"),
    "ref_ema_eta": (None, "a reference model"),
}
"""Options of parts that this version does not have: their only value, and the part."""


POSITIVE = (
    "eps_clip",
    "eps_clip_high",
    "behav_imp_weight_cap",
    "early_stop_imp_ratio",
    "max_reward_clip",
    "recompute_max_tokens_per_mb",
)


@dataclass(frozen=True)
class PPOConfig:
    """What is optimised.

    Attributes:
        n_minibatches: optimiser updates per training step (AReaL: `ppo_n_minibatches`).
        recompute_logprob: compute the log-probabilities of the trainer's weights before the updates.
        recompute_max_tokens_per_mb: most tokens of one forward pass of that; None: as in training (AReaL: `actor_inf.mb_spec`).
        use_decoupled_loss: clip around the trainer's weights before the updates, and weight by their ratio to what sampled.
        eps_clip: how far the probability ratio may move before it is clipped.
        eps_clip_high: how far it may rise; `eps_clip` if None.
        c_clip: dual clip, above 1; None is off.
        behav_imp_weight_cap: tokens with a larger importance weight leave the loss; None is off.
        early_stop_imp_ratio: a minibatch whose mean ratio passes this is skipped and counted; None is off.
        discount: gamma.
        gae_lambda: lambda.
        adv_norm: normalise advantages over all loss tokens of the batch.
        group_adv_norm: normalise scores within each prompt's answers (GRPO); takes the place of `adv_norm`.
        reward_output_scaling: factor on rewards.
        reward_output_bias: subtracted from rewards before scaling.
        max_reward_clip: bound of scaled rewards.
        mask_no_eos_with_zero: a truncated answer scores 0.
        mask_too_long: a truncated answer is not trained on.
        disable_value: no critic.
        value_eps_clip: clip range of the critic.
        value_norm: normalise the critic's returns; without effect while there is none.
        kl_ctl: weight of the KL penalty.
        use_adaptive_kl_ctl: adapt that weight.
        adaptive_kl_target: KL to hold.
        adaptive_kl_horizon: samples over which it adapts.
        ref_ema_eta: rate of a moving reference model.
    """

    n_minibatches: int = 4
    recompute_logprob: bool = True
    recompute_max_tokens_per_mb: int | None = None
    use_decoupled_loss: bool = True
    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    c_clip: float | None = None
    behav_imp_weight_cap: float | None = None
    early_stop_imp_ratio: float | None = 5.0
    discount: float = 1.0
    gae_lambda: float = 1.0
    adv_norm: bool = True
    group_adv_norm: bool = False
    reward_output_scaling: float = 5.0
    reward_output_bias: float = 0.0
    max_reward_clip: float = 20.0
    mask_no_eos_with_zero: bool = False
    mask_too_long: bool = False
    disable_value: bool = True
    value_eps_clip: float = 0.2
    value_norm: bool = True
    kl_ctl: float = 0.0
    use_adaptive_kl_ctl: bool = False
    adaptive_kl_target: float = 6.0
    adaptive_kl_horizon: float = 10000.0
    ref_ema_eta: float | None = None

    def __post_init__(self) -> None:
        for name, (only, part) in NOT_YET.items():
            if getattr(self, name) != only:
                raise ValueError(f"ppo.{name}={getattr(self, name)} needs {part}, which this version lacks: leave it at {only}")
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        if self.n_minibatches < 1:
            raise ValueError(f"ppo.n_minibatches={self.n_minibatches} must be at least 1")
        if self.c_clip is not None and self.c_clip <= 1:
            raise ValueError(f"ppo.c_clip={self.c_clip} must be above 1, or null for no dual clip")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"ppo.{name}={value} must be positive")
        if not (0 <= self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(f"ppo.discount={self.discount} and ppo.gae_lambda={self.gae_lambda} must lie in [0, 1]")

    def _check_combinations(self) -> None:
        if self.use_decoupled_loss and not self.recompute_logprob:
            raise ValueError(
                "ppo.use_decoupled_loss=true needs the log-probabilities of ppo.recompute_logprob=true: turn both on or both off"
            )
        if self.behav_imp_weight_cap is not None and not self.use_decoupled_loss:
            raise ValueError(
                f"ppo.behav_imp_weight_cap={self.behav_imp_weight_cap} caps the weight of ppo.use_decoupled_loss, which is off: "
                "turn it on or leave the cap at null"
            )
        if self.recompute_max_tokens_per_mb is not None and not self.recompute_logprob:
            raise ValueError(
                f"ppo.recompute_max_tokens_per_mb={self.recompute_max_tokens_per_mb} limits ppo.recompute_logprob, which is off: "
                "turn it on or leave the limit at null"
            )
