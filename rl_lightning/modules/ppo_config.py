"""PPOConfig: the options of the policy objective, under AReaL's names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rl_lightning.objectives.aggregation import Aggregation
from rl_lightning.objectives.choice import check_choice
from rl_lightning.objectives.corrections import Correction, check_bounds
from rl_lightning.objectives.estimators import ESTIMATORS, AdvantageEstimator
from rl_lightning.objectives.kl import KLEstimator
from rl_lightning.objectives.policy import Surrogate

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"]
Prox = Literal["recompute", "a3po"]

CHOICES = {
    "surrogate": get_args(Surrogate),
    "prox": get_args(Prox),
    "aggregation": get_args(Aggregation),
    "advantage": get_args(Advantage),
    "kl_estimator": get_args(KLEstimator),
}

POSITIVE = (
    "n_minibatches",
    "recompute_max_tokens_per_mb",
    "eps_clip",
    "eps_clip_high",
    "behav_imp_weight_cap",
    "behav_imp_weight_floor",
    "m2_threshold",
    "token_sum_norm",
    "early_stop_imp_ratio",
    "max_reward_clip",
    "overlong_buffer",
    "overlong_penalty",
    "value_eps_clip",
    "adaptive_kl_target",
    "adaptive_kl_horizon",
    "ref_ema_eta",
)

MATTERS_WITH = {
    "recompute_max_tokens_per_mb": "recompute_logprob=true",
    "prox": "use_decoupled_loss=true",
    "behav_imp_weight_cap": "use_decoupled_loss=true",
    "behav_imp_weight_floor": "use_decoupled_loss=true",
    "correction": "use_decoupled_loss=true",
    "m2_threshold": "correction=m2po",
    "token_sum_norm": "aggregation=token-sum-norm",
    "overlong_penalty": "overlong_buffer",
    "value_eps_clip": "disable_value=false",
    "kl_estimator": "kl_ctl",
    "use_adaptive_kl_ctl": "kl_ctl",
    "adaptive_kl_target": "use_adaptive_kl_ctl=true",
    "adaptive_kl_horizon": "use_adaptive_kl_ctl=true",
    "ref_ema_eta": "kl_ctl",
}
"""Options that do something only together with another one: with that value of it, or with any but null and 0."""


@dataclass(frozen=True)
class PPOConfig:
    """What is optimised.

    Attributes:
        n_minibatches: optimiser updates per training step (AReaL: `ppo_n_minibatches`).
        recompute_logprob: compute the log-probabilities of the trainer's weights before the updates.
        recompute_max_tokens_per_mb: most tokens of one forward pass of that; None: as in training (AReaL: `actor_inf.mb_spec`).
        use_decoupled_loss: clip around the trainer's weights before the updates, and weight by their ratio to what sampled.
        prox: where these log-probabilities come from: recomputed, or approximated without a forward pass (A-3PO).
        surrogate: the ratio that is clipped: of a token (ppo), of an answer (gspo), or clipped without gradient (cispo).
        correction: what the decoupled loss does with the weight: drop it above the cap (decoupled), clamp it (tis), drop tokens
            (icepop) or answers (sequence-mask) out of bounds, or the tokens that drifted most (m2po).
        eps_clip: how far the probability ratio may move before it is clipped.
        eps_clip_high: how far it may rise; `eps_clip` if None.
        c_clip: dual clip, above 1; None is off.
        behav_imp_weight_cap: largest importance weight; tokens above it leave the loss, as the correction says. None is off.
        behav_imp_weight_floor: smallest importance weight, for icepop and sequence-mask.
        m2_threshold: largest mean squared drift of the tokens that m2po keeps.
        aggregation: how tokens and answers are averaged.
        token_sum_norm: constant divisor of token-sum-norm; None: the run's `max_new_tokens`.
        early_stop_imp_ratio: a minibatch whose mean ratio passes this is skipped and counted; None is off.
        advantage: the estimator; gae is the only one that a critic helps.
        discount: gamma.
        gae_lambda: lambda.
        adv_norm: normalise advantages over all loss tokens of the batch; for gae, and always for reinforce++.
        group_adv_norm: normalise scores within each prompt's answers: another name for the advantage grpo.
        reward_output_scaling: factor on rewards.
        reward_output_bias: subtracted from rewards before scaling.
        max_reward_clip: bound of scaled rewards.
        overlong_buffer: tokens before `max_new_tokens` over which an answer's penalty grows (DAPO); None is off.
        overlong_penalty: what an answer of the full length loses of its raw reward.
        mask_no_eos_with_zero: a truncated answer scores 0.
        mask_too_long: a truncated answer is not trained on.
        disable_value: no critic.
        value_eps_clip: clip range of the critic.
        value_norm: normalise the critic's returns; without effect where there is none.
        kl_ctl: weight of the KL penalty in the reward; 0 is off, and no reference model is loaded.
        kl_estimator: of a token's KL from its sample.
        use_adaptive_kl_ctl: adapt that weight.
        adaptive_kl_target: KL of an answer to hold.
        adaptive_kl_horizon: answers over which it adapts.
        ref_ema_eta: share of the way to the actor that the reference moves after each step; None: it stays.
    """

    n_minibatches: int = 4
    recompute_logprob: bool = True
    recompute_max_tokens_per_mb: int | None = None
    use_decoupled_loss: bool = True
    prox: Prox = "recompute"
    surrogate: Surrogate = "ppo"
    correction: Correction = "decoupled"
    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    c_clip: float | None = None
    behav_imp_weight_cap: float | None = None
    behav_imp_weight_floor: float | None = None
    m2_threshold: float = 0.04
    aggregation: Aggregation = "token-mean"
    token_sum_norm: float | None = None
    early_stop_imp_ratio: float | None = 5.0
    advantage: Advantage = "gae"
    discount: float = 1.0
    gae_lambda: float = 1.0
    adv_norm: bool = True
    group_adv_norm: bool = False
    reward_output_scaling: float = 5.0
    reward_output_bias: float = 0.0
    max_reward_clip: float = 20.0
    overlong_buffer: int | None = None
    overlong_penalty: float = 1.0
    mask_no_eos_with_zero: bool = False
    mask_too_long: bool = False
    disable_value: bool = True
    value_eps_clip: float = 0.2
    value_norm: bool = True
    kl_ctl: float = 0.0
    kl_estimator: KLEstimator = "k1"
    use_adaptive_kl_ctl: bool = False
    adaptive_kl_target: float = 6.0
    adaptive_kl_horizon: float = 10000.0
    ref_ema_eta: float | None = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_prox()
        self._check_partners()
        check_bounds(self.correction, cap=self.behav_imp_weight_cap, floor=self.behav_imp_weight_floor)
        self._check_loss()
        self._check_advantage()

    @property
    def estimator(self) -> AdvantageEstimator:
        """What is done to scores and advantages."""
        return ESTIMATORS["grpo" if self.group_adv_norm else self.advantage]

    @property
    def normalizes_over_batch(self) -> bool:
        """Whether advantages are normalised over all loss tokens of the batch."""
        over_batch = self.estimator.over_batch
        return self.adv_norm if over_batch is None else over_batch

    def _check_ranges(self) -> None:
        for name, choices in CHOICES.items():
            check_choice(f"ppo.{name}", getattr(self, name), choices)
        if self.c_clip is not None and self.c_clip <= 1:
            raise ValueError(f"ppo.c_clip={self.c_clip} must be above 1, or null for no dual clip")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"ppo.{name}={value} must be positive")
        if not (0 <= self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(f"ppo.discount={self.discount} and ppo.gae_lambda={self.gae_lambda} must lie in [0, 1]")
        if self.kl_ctl < 0 or (self.ref_ema_eta or 0) > 1:
            raise ValueError(f"ppo.kl_ctl={self.kl_ctl} must not be negative, nor ppo.ref_ema_eta={self.ref_ema_eta} above 1")

    def _check_prox(self) -> None:
        if self.use_decoupled_loss and self.prox == "recompute" and not self.recompute_logprob:
            raise ValueError(
                "ppo.use_decoupled_loss=true needs the log-probabilities of ppo.recompute_logprob=true or ppo.prox=a3po: "
                "turn one of them on, or the decoupled loss off"
            )
        if self.prox == "a3po" and self.recompute_logprob:
            raise ValueError(
                "ppo.prox=a3po approximates what ppo.recompute_logprob=true computes: turn recompute_logprob off, "
                "or leave prox at recompute"
            )

    def _check_partners(self) -> None:
        """Refuses options that would do nothing: whoever sets one expects something of it."""
        defaults = {f.name: f.default for f in fields(self)}
        for name, partner in MATTERS_WITH.items():
            other, _, wanted = partner.partition("=")
            value, held = getattr(self, name), getattr(self, other)
            is_on = _written(held) == wanted if wanted else bool(held)
            if value != defaults[name] and not is_on:
                raise ValueError(
                    f"ppo.{name}={_written(value)} does nothing without ppo.{partner}: set that as well, "
                    f"or leave {name} at {_written(defaults[name])}"
                )

    def _check_loss(self) -> None:
        if self.correction == "m2po" and self.prox == "a3po":
            raise ValueError(
                "ppo.correction=m2po chooses tokens before the updates, where ppo.prox=a3po knows nothing yet: set prox=recompute"
            )
        if self.surrogate == "cispo" and self.c_clip is not None:
            raise ValueError(f"ppo.c_clip={self.c_clip} bounds a ratio that ppo.surrogate=cispo clips itself: leave it at null")

    def _check_advantage(self) -> None:
        if self.group_adv_norm and self.advantage not in ("gae", "grpo"):
            raise ValueError(f"ppo.group_adv_norm=true means ppo.advantage=grpo, but that is {self.advantage}: set only one")
        if not self.disable_value and self.estimator is not ESTIMATORS["gae"]:
            name = "group_adv_norm=true" if self.group_adv_norm else f"advantage={self.advantage}"
            raise ValueError(
                f"ppo.{name} does without the critic that ppo.disable_value=false trains: "
                "set advantage=gae and group_adv_norm=false, or disable_value=true"
            )
        if self.estimator.over_batch and not self.adv_norm:
            raise ValueError(
                f"ppo.advantage={self.advantage} normalises over the batch, which ppo.adv_norm=false forbids: "
                "set adv_norm=true or choose another estimator"
            )
        if self.overlong_buffer is not None and self.mask_no_eos_with_zero:
            raise ValueError(
                f"ppo.mask_no_eos_with_zero=true lifts the penalty of ppo.overlong_buffer={self.overlong_buffer} "
                "from truncated answers: set only one of them"
            )


def _written(value: Any) -> str:
    """As on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
