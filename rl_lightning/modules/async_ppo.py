"""AsyncPPOModule: asynchronous PPO as a LightningModule.

One `training_step` is one rollout batch:

    rewards -> compute_advantages -> [n minibatches: forward, policy_loss, backward, clip, step] -> version + 1

Users change what is optimised by overriding `policy_loss` or `compute_advantages`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.modules.data_check import check_data
from rl_lightning.modules.language_model import LanguageModule, as_config
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.policy_batch import LossTokens, PolicyBatch
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.modules.rollout_statistics import add_engine_difference, add_rollout_statistics
from rl_lightning.modules.statistics import StepStatistics
from rl_lightning.objectives.advantages import gae, normalize, scale_rewards
from rl_lightning.objectives.policy import ppo_loss
from rl_lightning.types import Batch


class AsyncPPOModule(LanguageModule):
    """Trains a causal language model on rollouts that are up to `max_head_offpolicyness` versions old.

    Args:
        path: folder or hub name of the model (the actor).
        optimizer: how weights are updated.
        ppo: what is optimised.
        max_tokens_per_mb: most tokens of one forward and backward pass.
        dtype: type of the weights under training; engines get them in their own.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        share_prompts: run the prompt of answers to the same question once; None: on the CPU only.
        seed: of the order in which groups are dealt to minibatches.
        logprob_diff_limit: engine and trainer disagree on a token if their log-probabilities differ by more.
        critic_path: model of the critic; there is none in this version.
        ref_path: model of the reference; there is none in this version.

    Raises:
        ValueError: options that contradict each other or need a part that is not there; the message names them.
    """

    def __init__(
        self,
        path: str,
        optimizer: OptimizerConfig = OptimizerConfig(),
        ppo: PPOConfig = PPOConfig(),
        max_tokens_per_mb: int = 30720,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        gradient_checkpointing: bool = False,
        share_prompts: bool | None = None,
        seed: int = 1,
        logprob_diff_limit: float = 0.1,
        critic_path: str | None = None,
        ref_path: str | None = None,
    ) -> None:
        for name, value in (("critic_path", critic_path), ("ref_path", ref_path)):
            if value is not None:
                raise ValueError(f"{name}={value} asks for a second model, which this version does not have: leave it at null")
        super().__init__(path, optimizer, max_tokens_per_mb, dtype, gradient_checkpointing, share_prompts, seed)
        self.ppo = as_config(PPOConfig, ppo)
        self.logprob_diff_limit = logprob_diff_limit
        self.remember(
            path=path,
            optimizer=self.optimizer_config,
            ppo=self.ppo,
            max_tokens_per_mb=max_tokens_per_mb,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            share_prompts=share_prompts,
            seed=seed,
            logprob_diff_limit=logprob_diff_limit,
        )

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
        return ppo_loss(
            logprobs,
            tokens.behav_logprobs,
            tokens.advantages,
            tokens.loss_mask,
            prox_logprobs=tokens.prox_logprobs if self.ppo.use_decoupled_loss else None,
            eps_clip=self.ppo.eps_clip,
            eps_clip_high=self.ppo.eps_clip_high,
            c_clip=self.ppo.c_clip,
            behav_imp_weight_cap=self.ppo.behav_imp_weight_cap,
            normalizer=tokens.normalizer,
        )

    def compute_advantages(self, batch: Batch) -> Tensor:
        """(T,) advantages of the batch's tokens, as they enter the loss; off the loss mask they do not matter.

        The default spreads each answer's score over its tokens and normalises as configured. A collective: called on all
        ranks once a step. The batch is on the CPU.
        """
        scores = self.scores(batch)
        if self.ppo.group_adv_norm:
            scores = normalize(scores, batch.group_ids, mean_level="group", std_level="group")
        advantages = self.spread(scores, batch)
        if self.ppo.adv_norm and not self.ppo.group_adv_norm:
            advantages = self.normalize_over_batch(advantages, batch.loss_mask)
        return advantages

    # -- pieces of the default

    def scores(self, batch: Batch) -> Tensor:
        """(S,) scaled and clipped rewards; 0 for a truncated answer where so configured."""
        ppo = self.ppo
        scores = scale_rewards(
            batch.rewards, bias=ppo.reward_output_bias, scaling=ppo.reward_output_scaling, clip=ppo.max_reward_clip
        )
        return torch.where(batch.truncated, 0.0, scores) if ppo.mask_no_eos_with_zero else scores

    def spread(self, scores: Tensor, batch: Batch) -> Tensor:
        """(T,): each answer's score at its last loss token, carried back by discount and lambda with no critic (V = 0)."""
        total = torch.zeros(len(batch.loss_mask) + 1, dtype=torch.int64)
        torch.cumsum(batch.loss_mask, 0, out=total[1:])
        cu_seqlens = total[batch.cu_seqlens.long()]
        answered = cu_seqlens.diff() > 0
        rewards = torch.zeros(int(cu_seqlens[-1]))
        rewards[cu_seqlens[1:][answered] - 1] = scores.float()[answered]
        values = rewards.new_zeros(len(rewards) + batch.n_seqs)
        ended = torch.zeros(batch.n_seqs, dtype=torch.bool)
        spread, _ = gae(rewards, values, cu_seqlens, ended, discount=self.ppo.discount, gae_lambda=self.ppo.gae_lambda)
        return torch.zeros(len(batch.loss_mask)).masked_scatter_(batch.loss_mask, spread)

    def normalize_over_batch(self, values: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
        """(T,) `values` to mean 0 and spread 1 over the masked tokens of all ranks, biased, in float64. A collective."""
        chosen = values[mask].double()
        count, total = self.ranks.sum(torch.stack([mask.sum().double(), chosen.sum()]), self.device).tolist()
        mean = total / max(count, 1.0)
        variance = float(self.ranks.sum((chosen - mean).square().sum(), self.device)) / max(count, 1.0)
        return ((values.double() - mean) / (math.sqrt(variance) + eps)).float()

    # -- LightningModule

    def configure_callbacks(self) -> Sequence[Callback]:
        """Engines follow the weights."""
        from rl_lightning.weights.publisher import WeightPublisher

        return [WeightPublisher()]

    def check_data(self, data: Any, world_size: int) -> None:
        """Refuses data that these options cannot train on; see `data_check.check_data`."""
        check_data(data, self.ppo, self.max_tokens_per_mb, world_size)

    def on_fit_start(self) -> None:
        """Checks the data and takes the sampling temperature from it.

        Raises:
            ValueError: names both options that do not go together.
        """
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        self.check_data(data, self.trainer.world_size)
        generation = getattr(data, "generation", None)
        if generation is not None:
            self.temperature = 1.0 if generation.greedy else generation.temperature

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One rollout batch: `n_minibatches` updates, one counted step."""
        batch = batch.to("cpu")  # micro-batches go to the device when their turn comes
        if self.ppo.mask_too_long:
            too_long = torch.repeat_interleave(batch.truncated, batch.cu_seqlens.diff().long())
            batch = replace(batch, loss_mask=batch.loss_mask & ~too_long)
        statistics, rate, started = StepStatistics(), self.learning_rate, time.perf_counter()
        advantages, minibatches = self.compute_advantages(batch), self.minibatches(batch)
        policy = self._score_before_updates(batch, advantages, minibatches)
        scored = time.perf_counter()
        with self.one_counted_step():
            for number, sequences in enumerate(minibatches):
                self._train_minibatch(policy, sequences, statistics, is_first=number == 0)
        times = {"time/recompute": scored - started, "time/update": time.perf_counter() - scored}
        self._report(policy, statistics, {**times, "lr": rate})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs mean reward, share of right answers and of prompts with at least one, over all ranks. A collective."""
        right = batch.rewards > 0
        solved = batch.group_ids[right].unique()
        counts: list[Any] = [batch.rewards.sum(), right.sum(), batch.n_seqs, len(solved), len(batch.group_ids.unique())]
        sums = self.ranks.sum(torch.tensor([float(x) for x in counts], dtype=torch.float64), self.device)
        reward, n_right, n_answers, n_solved, n_prompts = sums.tolist()
        results = {"reward": reward / n_answers, "accuracy": n_right / n_answers, "pass_at_k": n_solved / n_prompts}
        self.log_dict({f"val_{name}": value for name, value in results.items()}, batch_size=1, sync_dist=True)

    def minibatches(self, batch: Batch) -> list[list[int]]:
        """This rank's sequences dealt to `n_minibatches` equal parts; a function of the seed and the global step.

        Groups are shuffled and cut by the count of sequences, so that answers to one prompt mostly stay together.
        """
        n_minibatches = self.ppo.n_minibatches
        if batch.n_seqs % n_minibatches:
            raise ValueError(f"{batch.n_seqs} answers on a rank cannot be cut into ppo.n_minibatches={n_minibatches} equal parts")
        groups: dict[int, list[int]] = {}
        for sequence, group in enumerate(batch.group_ids.tolist()):
            groups.setdefault(group, []).append(sequence)
        members = list(groups.values())
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.global_step)
        order = torch.randperm(len(members), generator=generator).tolist() if n_minibatches > 1 else range(len(members))
        shuffled = [sequence for group in order for sequence in members[group]]
        size = batch.n_seqs // n_minibatches
        return [shuffled[start : start + size] for start in range(0, batch.n_seqs, size)]

    # -- inside

    def _score_before_updates(self, batch: Batch, advantages: Tensor, minibatches: Sequence[Sequence[int]]) -> PolicyBatch:
        """pi_prox of all minibatches but the first, which runs under these weights anyway and then adds its own."""
        later = [sequence for sequences in minibatches[1:] for sequence in sequences]
        recompute = self.ppo.recompute_logprob
        prox = self.batch_logprobs(batch, later if recompute else [], self.ppo.recompute_max_tokens_per_mb)
        return PolicyBatch(batch, advantages, prox, recompute)

    def _train_minibatch(
        self, policy: PolicyBatch, sequences: Sequence[int], statistics: StepStatistics, *, is_first: bool
    ) -> None:
        n_tokens = torch.tensor(policy.n_loss_tokens(sequences), dtype=torch.float64)
        normalizer = max(1.0, float(self.ranks.sum(n_tokens, self.device)))
        ratio = torch.zeros(2, dtype=torch.float64)

        def micro_loss(micro: MicroBatch) -> Tensor:
            logprobs, entropy = self.score(micro, with_entropy=True)
            assert entropy is not None
            if micro.is_empty:
                return logprobs.sum() * 0.0
            if is_first:
                policy.learn_prox(micro, logprobs)
            loss, by_token = self.policy_loss(logprobs, policy.tokens(micro, entropy, normalizer))
            self._add_loss_statistics(statistics, loss, {**by_token, "entropy": entropy})
            if "importance_weight" in by_token:
                ratio.add_(torch.tensor([float(by_token["importance_weight"].double().sum()), float(len(entropy))]))
            return loss

        micro_batches = self.micro_batches(policy.batch, sequences, self.max_tokens_per_mb)
        norm = self.update(micro_batches, micro_loss, lambda: self._admits(ratio))
        self._count_update(norm, statistics)

    def _add_loss_statistics(self, statistics: StepStatistics, loss: Tensor, by_token: Mapping[str, Tensor]) -> None:
        statistics.add_sum("actor_loss", loss / self.ppo.n_minibatches)
        for name, values in by_token.items():
            statistics.add_values(name, values)

    def _admits(self, ratio: Tensor) -> bool:
        """Whether the mean importance ratio, from its (sum, count) on this rank, is small enough to update on."""
        total, count = self.ranks.sum(ratio, self.device).tolist()
        limit = self.ppo.early_stop_imp_ratio
        return limit is None or total <= limit * count

    def _count_update(self, norm: float | None, statistics: StepStatistics) -> None:
        is_finite = norm is not None and math.isfinite(norm)
        first_rank = self.global_rank == 0  # every rank knows the same: counted once
        statistics.add_sum("skipped_minibatches", float(first_rank and norm is None))
        statistics.add_sum("nonfinite_gradients", float(first_rank and norm is not None and not is_finite))
        if norm is not None and is_finite:
            statistics.add_mean("grad_norm", norm, 1.0)

    def _report(self, policy: PolicyBatch, statistics: StepStatistics, own: dict[str, float]) -> None:
        batch = policy.batch
        add_rollout_statistics(statistics, batch, self.scores(batch))
        add_engine_difference(statistics, batch, policy.prox_logprobs, self.logprob_diff_limit)
        statistics.add_values("advantages", policy.advantages[batch.loss_mask])
        reduced, histograms = statistics.reduce(self.ranks)
        reduced["reward_std"] = math.sqrt(max(0.0, reduced.pop("reward_square") - reduced["task_reward"] ** 2))
        self.record(reduced | own, histograms)
        bar = {"reward": reduced["task_reward"], "staleness": reduced["head_offpolicyness"]}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=1)
