"""AsyncPPOModule: asynchronous PPO as a LightningModule.

One `training_step` is one rollout batch:

    reference, critic -> compute_advantages -> [n minibatches: forward, policy_loss, backward, clip, step] -> version + 1

Users change what is optimised by overriding `policy_loss`, `compute_advantages` or `compute_returns`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.checkpointing import Checkpointing
from rl_lightning.models.folder import check_model_folder
from rl_lightning.models.lora import LoRAConfig, merged_weights
from rl_lightning.models.value_model import ValueModel
from rl_lightning.modules.critic import Critic, ValueTargets, add_explained_variance, add_value_statistics
from rl_lightning.modules.data_check import check_data
from rl_lightning.modules.hyperparameters import as_config
from rl_lightning.modules.m2_selection import select_m2
from rl_lightning.modules.minibatches import deal_minibatches
from rl_lightning.modules.model_check import check_models
from rl_lightning.modules.objective import PolicyObjective
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.override_check import checked_by_token, checked_loss
from rl_lightning.modules.policy_batch import PolicyBatch
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.modules.reference import Reference, load_reference
from rl_lightning.modules.rollout_statistics import add_engine_difference, add_rollout_statistics
from rl_lightning.modules.scored_batch import ScoredBatch, with_end_tokens
from rl_lightning.modules.statistics import StepStatistics
from rl_lightning.types import Batch


class AsyncPPOModule(PolicyObjective):
    """Trains a causal language model on rollouts that are up to `max_head_offpolicyness` versions old.

    Args:
        path: folder or hub name of the model (the actor).
        optimizer: how weights are updated.
        ppo: what is optimised.
        max_tokens_per_mb: most tokens of one forward and backward pass.
        dtype: type of the weights under training; engines get them in their own.
        gradient_checkpointing: what the backward pass computes again instead of keeping it: `none` (or false), `light` (all but
            matrix products and attention), `selective` (the MLPs' products too), `full` (or true; all of the layers), or
            `auto`: of each layer as little as the GPU's memory allows.
        share_prompts: run the prompt of answers to the same question once; None: on the CPU, and on CUDA where that saves more
            than 15 % of the tokens (half precision without sliding windows only).
        seed: of the order in which groups are dealt to minibatches, and of new adapters.
        logprob_diff_limit: engine and trainer disagree on a token if their log-probabilities differ by more.
        lora: train adapters instead of the actor's own weights; None: train all weights.
        compile: compile the decoder layers with torch.compile, in the first step; None: on CUDA only.
        critic_path: folder or hub name of the critic, with a value head or without; for `ppo.disable_value=false`.
        init_critic_from_actor: start the critic from the actor's weights instead.
        critic_optimizer: how the critic is updated.
        critic_max_tokens_per_mb: most tokens of one pass of the critic; None: as the actor.
        ref_path: folder or hub name of the reference that `ppo.kl_ctl` holds the actor to; None: the actor's own path.
        ref_max_tokens_per_mb: most tokens of one pass of the reference; None: as the actor (AReaL: `ref_inf.mb_spec`).

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
        gradient_checkpointing: bool | Checkpointing = False,
        share_prompts: bool | None = None,
        seed: int = 1,
        logprob_diff_limit: float = 0.1,
        lora: LoRAConfig | None = None,
        compile: bool | None = None,
        critic_path: str | None = None,
        init_critic_from_actor: bool = False,
        critic_optimizer: OptimizerConfig = OptimizerConfig(),
        critic_max_tokens_per_mb: int | None = None,
        ref_path: str | None = None,
        ref_max_tokens_per_mb: int | None = None,
    ) -> None:
        actor: dict[str, Any] = {
            "optimizer": optimizer,
            "max_tokens_per_mb": max_tokens_per_mb,
            "dtype": dtype,
            "gradient_checkpointing": gradient_checkpointing,
            "share_prompts": share_prompts,
            "seed": seed,
            "lora": lora,
            "compile": compile,
        }
        super().__init__(path, ppo, **actor)
        self.critic_optimizer_config = as_config(OptimizerConfig, critic_optimizer)
        beside: dict[str, Any] = {
            "critic_path": critic_path,
            "init_critic_from_actor": init_critic_from_actor,
            "critic_optimizer": self.critic_optimizer_config,
            "critic_max_tokens_per_mb": critic_max_tokens_per_mb,
            "ref_path": ref_path,
            "ref_max_tokens_per_mb": ref_max_tokens_per_mb,
        }
        check_models(self.ppo, **beside)
        self.logprob_diff_limit = logprob_diff_limit
        self.critic_path, self.ref_path = critic_path or path, ref_path or path
        self.critic_max_tokens_per_mb = critic_max_tokens_per_mb or max_tokens_per_mb
        self.ref_max_tokens_per_mb = ref_max_tokens_per_mb or max_tokens_per_mb
        self.critic: Any = None
        self.reference: Reference | None = None
        self._saved_reference: dict[str, Tensor] | None = None
        self.remember(path=path, ppo=ppo, logprob_diff_limit=logprob_diff_limit, **actor, **beside)

    def check_inputs(self, trainer: Trainer) -> None:
        """The same for the models beside the actor."""
        super().check_inputs(trainer)
        for option, path, is_used in (
            ("model.critic_path", self.critic_path, not self.ppo.disable_value),
            ("model.ref_path", self.ref_path, bool(self.ppo.kl_ctl)),
        ):
            if is_used and path != self.path:
                check_model_folder(option, path)

    # -- LightningModule

    def configure_callbacks(self) -> Sequence[Callback]:
        """Engines follow the weights."""
        from rl_lightning.callbacks.weight_publisher import WeightPublisher

        return [WeightPublisher()]

    def configure_model(self) -> None:
        """Loads the actor, and the critic where there is one. Idempotent."""
        super().configure_model()
        if self.critic is None and not self.ppo.disable_value:
            options: dict[str, Any] = {"gradient_checkpointing": self.gradient_checkpointing, "sharding": self.sharding}
            model = ValueModel(self.critic_path, self.dtype_of_weights, **options)
            self.critic = Critic(model, value_norm=self.ppo.value_norm, value_eps_clip=self.ppo.value_eps_clip)

    def trained(self) -> list[tuple[torch.nn.Module, OptimizerConfig]]:
        """The actor, and the critic where there is one."""
        return super().trained() + ([] if self.critic is None else [(self.critic, self.critic_optimizer_config)])

    def check_data(self, data: Any, world_size: int) -> None:
        """Refuses data that these options cannot train on; see `data_check.check_data`."""
        limits = {"max_tokens_per_mb": self.max_tokens_per_mb}
        if self.ppo.recompute_max_tokens_per_mb is not None:
            limits["ppo.recompute_max_tokens_per_mb"] = self.ppo.recompute_max_tokens_per_mb
        if not self.ppo.disable_value:
            limits["critic_max_tokens_per_mb"] = self.critic_max_tokens_per_mb
        if self.ppo.kl_ctl:
            limits["ref_max_tokens_per_mb"] = self.ref_max_tokens_per_mb
        check_data(data, self.ppo, limits, world_size)

    def on_fit_start(self) -> None:
        """Checks the data, takes from it how answers are sampled, and loads the reference where there is one.

        Raises:
            ValueError: names both options that do not go together.
        """
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        self.check_data(data, self.ranks.size)
        generation = getattr(data, "generation", None)
        if generation is not None:
            self.temperature = 1.0 if generation.greedy else generation.temperature
            self.max_new_tokens = generation.max_new_tokens
        if self.ppo.kl_ctl and self.reference is None:
            self.reference = load_reference(self)
            self.speed_up([self.reference.model])
        self._restore_reference()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What moves with training beside the weights: the penalty's weight, and a reference that follows the actor."""
        if self.ppo.use_adaptive_kl_ctl:
            checkpoint["kl_ctl"] = self.kl_ctl
        if self.ppo.ref_ema_eta is not None and self.reference is not None:
            checkpoint["reference"] = self.reference.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with them."""
        if self.ppo.use_adaptive_kl_ctl:
            self.kl_ctl = checkpoint.get("kl_ctl", self.kl_ctl)
        if self.ppo.ref_ema_eta is not None:
            self._saved_reference = checkpoint.get("reference")
            self._restore_reference()

    def _restore_reference(self) -> None:
        """Once both are there: some strategies read the checkpoint before training is set up, others after."""
        if self.reference is not None and self._saved_reference is not None:
            self.reference.load_state_dict(self._saved_reference)
            self._saved_reference = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One rollout batch: `n_minibatches` updates, one counted step."""
        batch = batch.to("cpu")  # from another data module; micro-batches go to the device when their turn comes
        if self.ppo.mask_too_long:
            too_long = torch.repeat_interleave(batch.truncated, batch.cu_seqlens.diff().long())
            batch = replace(batch, loss_mask=batch.loss_mask & ~too_long)
        statistics, rate, started = StepStatistics(), self.learning_rate, time.perf_counter()
        scored = self._ask_others(batch)
        advantages = checked_by_token(self, "compute_advantages", self.compute_advantages(scored), len(batch.loss_mask))
        minibatches = self.minibatches(batch)
        targets = self._value_targets(scored, statistics)
        policy = self._score_before_updates(batch, advantages, minibatches)
        prepared = time.perf_counter()
        with self.one_counted_step():
            for number, sequences in enumerate(minibatches):
                self._train_minibatch(policy, sequences, statistics, is_first=number == 0)
                if targets is not None:
                    self._train_critic(policy, targets, sequences, statistics)
        if self.reference is not None and self.ppo.ref_ema_eta is not None:
            self.reference.follow(merged_weights(self.model), self.ppo.ref_ema_eta)
        times = {"time/recompute": prepared - started, "time/update": time.perf_counter() - prepared}
        self._report(scored, policy, statistics, {**times, "lr": rate})

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
        """This rank's sequences dealt to `n_minibatches` equal parts; a function of the seed and the global step."""
        seed = self.seed * 1_000_003 + self.trainer.global_step
        return deal_minibatches(batch.group_ids.tolist(), self.ppo.n_minibatches, seed=seed)

    # -- inside

    def _ask_others(self, batch: Batch) -> ScoredBatch:
        """What reference and critic say before anything is updated."""
        ref_logprobs, values, last_values = None, None, None
        if (reference := self.reference) is not None:
            everything, scorer = range(batch.n_seqs), partial(reference.score, temperature=self.temperature)
            ref_logprobs = self.by_token(batch, everything, reference.model, scorer, self.ref_max_tokens_per_mb)
        if self.critic is not None:
            longer, tokens, ends = with_end_tokens(batch)
            output = self.by_token(longer, range(batch.n_seqs), self.critic, self.critic, self.critic_max_tokens_per_mb)
            said = self.critic.values(output)
            values, last_values = said[tokens], torch.where(ends >= 0, said[ends], 0.0)
        return ScoredBatch.of(batch, ref_logprobs=ref_logprobs, values=values, last_values=last_values)

    def _value_targets(self, batch: ScoredBatch, statistics: StepStatistics) -> ValueTargets | None:
        if self.critic is None or batch.values is None:
            return None
        returns = checked_by_token(self, "compute_returns", self.compute_returns(batch), len(batch.loss_mask))
        add_value_statistics(statistics, batch.values[batch.loss_mask], returns[batch.loss_mask])
        return self.critic.targets(batch.values, returns, batch.loss_mask, self.ranks)

    def _score_before_updates(self, batch: Batch, advantages: Tensor, minibatches: Sequence[Sequence[int]]) -> PolicyBatch:
        """pi_prox of all minibatches but the first, which runs under these weights anyway and then adds its own.

        Of the first as well where tokens are chosen by it before the loss.
        """
        ppo, is_m2po = self.ppo, self.ppo.correction == "m2po"
        wanted = [sequence for sequences in minibatches[0 if is_m2po else 1 :] for sequence in sequences]
        prox = self.batch_logprobs(batch, wanted if ppo.recompute_logprob else [], ppo.recompute_max_tokens_per_mb)
        keep = torch.zeros_like(batch.loss_mask) if is_m2po else None
        return PolicyBatch(batch, advantages, prox, ppo.recompute_logprob, keep)

    def _train_minibatch(
        self, policy: PolicyBatch, sequences: Sequence[int], statistics: StepStatistics, *, is_first: bool
    ) -> None:
        counts = self.ranks.sum(policy.counts(sequences), self.device)
        normalizer, ratios = self.loss_normalizer(counts), list[Tensor]()
        if policy.keep is not None:
            select_m2(policy, sequences, self.ranks, threshold=self.ppo.m2_threshold)

        def micro_loss(micro: MicroBatch) -> Tensor:
            logprobs, entropy = self.score(micro, with_entropy=True)
            assert entropy is not None
            if micro.is_empty:
                return logprobs.sum() * 0.0
            statistics.add_mean("packing_efficiency", micro.layout.n_tokens, self.max_tokens_per_mb)
            prox = policy.learn_prox(micro, logprobs) if is_first and policy.keep is None else None
            loss, by_token = checked_loss(self, self.policy_loss(logprobs, policy.tokens(micro, entropy, normalizer, prox)))
            self._add_loss_statistics(statistics, "actor_loss", loss, {**by_token, "entropy": entropy})
            if "importance_weight" in by_token:
                ratios.append(by_token["importance_weight"])
            return loss

        micro_batches = self.micro_batches(policy.batch, sequences, self.max_tokens_per_mb)
        norm = self.update(micro_batches, micro_loss, lambda: self._admits(ratios))
        self.count_update("grad_norm", norm, statistics)

    def _train_critic(
        self, policy: PolicyBatch, targets: ValueTargets, sequences: Sequence[int], statistics: StepStatistics
    ) -> None:
        n_tokens = max(1.0, float(self.ranks.sum(policy.counts(sequences), self.device)[0]))

        def micro_loss(micro: MicroBatch) -> Tensor:
            output = self.critic(micro)
            if micro.is_empty:
                return output.sum() * 0.0
            loss, by_token = self.critic.loss(output, micro, targets, n_tokens)
            self._add_loss_statistics(statistics, "value_loss", loss, by_token)
            return loss

        micro_batches = self.micro_batches(policy.batch, sequences, self.critic_max_tokens_per_mb)
        self.count_update("critic_grad_norm", self.update(micro_batches, micro_loss, of=1), statistics)

    def _add_loss_statistics(self, statistics: StepStatistics, name: str, loss: Tensor, by_token: Mapping[str, Tensor]) -> None:
        statistics.add_sum(name, loss / self.ppo.n_minibatches)
        for statistic, values in by_token.items():
            statistics.add_values(statistic, values)

    def _admits(self, ratios: Sequence[Tensor]) -> bool:
        """Whether the mean importance ratio of all ranks' tokens is small enough to update on."""
        limit = self.ppo.early_stop_imp_ratio
        if limit is None:
            return True
        mine = torch.tensor([sum(float(x.double().sum()) for x in ratios), sum(len(x) for x in ratios)], dtype=torch.float64)
        total, count = self.ranks.sum(mine, self.device).tolist()
        return total <= limit * count

    def _report(self, batch: ScoredBatch, policy: PolicyBatch, statistics: StepStatistics, own: dict[str, float]) -> None:
        add_rollout_statistics(statistics, batch, self.scores(batch), self.penalties(batch))
        policy.settle()
        add_engine_difference(statistics, batch, policy.prox_logprobs, self.logprob_diff_limit)
        statistics.add_values("advantages", policy.advantages[batch.loss_mask])
        if (kl := self.kl(batch)) is not None:
            statistics.add_mean("ref_kl", kl[batch.loss_mask].sum(), policy.counts(range(batch.n_seqs))[1])
        reduced, histograms = statistics.reduce(self.ranks)
        reduced["reward_std"] = math.sqrt(max(0.0, reduced.pop("reward_square") - reduced["task_reward"] ** 2))
        add_explained_variance(reduced)
        if "ref_kl" in reduced:
            reduced["kl_ctl"] = self.kl_ctl
            self.adapt_kl(reduced["ref_kl"], int(reduced["n_seqs"]))
        self.record(reduced | own, histograms)
        bar = {"reward": reduced["task_reward"], "staleness": reduced["head_offpolicyness"]}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=1)
