"""What a rollout batch says about the run before anything is trained on it."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lightning.modules.credit import token_rewards
from rl_lightning.modules.statistics import StepStatistics
from rl_lightning.types import Batch


def add_rollout_statistics(statistics: StepStatistics, batch: Batch, scores: Tensor, penalties: Tensor | None = None) -> None:
    """Rewards, lengths, staleness and failures of `batch`.

    Args:
        statistics: gets them.
        batch: on the CPU.
        scores: (S,) its scaled rewards.
        penalties: (T,) what each token costs for leaving the reference.
    """
    _add_rewards(statistics, batch, scores)
    _add_token_rewards(statistics, batch, scores, penalties)
    _add_lengths(statistics, batch)
    _add_staleness(statistics, batch)
    _add_groups(statistics, batch)
    _add_failures(statistics, batch)


def add_engine_difference(statistics: StepStatistics, batch: Batch, prox_logprobs: Tensor, limit: float) -> None:
    """How far engine and trainer disagree on tokens that both scored with the same weights.

    Args:
        statistics: gets the mean, maximum and share above `limit` of |behav - prox|.
        batch: with its version, that of the trainer's weights.
        prox_logprobs: (T,) of the trainer, NaN where it did not score.
        limit: in nats.
    """
    same = batch.loss_mask & (batch.versions == batch.version) & ~torch.isnan(prox_logprobs)
    difference = (batch.behav_logprobs - prox_logprobs)[same].abs()
    statistics.add_values("engine_logprob_diff", difference)
    statistics.add_values("engine_logprob_diff_over_limit", (difference > limit).float())
    if len(difference):
        statistics.add_max("engine_logprob_diff_max", float(difference.max()))


def _add_rewards(statistics: StepStatistics, batch: Batch, scores: Tensor) -> None:
    rewards = batch.rewards
    statistics.add_values("task_reward", rewards)
    statistics.distributions["reward"] = rewards
    statistics.add_values("scaled_reward", scores)
    statistics.add_values("success_rate", (rewards > 0).float())
    statistics.add_values("reward_square", rewards.double().square())
    tasks = [group.prompt.task for group in batch.groups for _ in group.rollouts]
    for task in sorted(set(tasks)):
        chosen = torch.tensor([name == task for name in tasks])
        statistics.add_values(f"{task}_reward", rewards[chosen])


def _add_token_rewards(statistics: StepStatistics, batch: Batch, scores: Tensor, penalties: Tensor | None) -> None:
    """Means over loss tokens: what KL gives and takes, and that together with the scores."""
    rewards = token_rewards(scores, batch, penalties)[batch.loss_mask]
    kl_rewards = torch.zeros_like(rewards) if penalties is None else -penalties.double()[batch.loss_mask]
    statistics.add_values("kl_reward", kl_rewards)
    statistics.add_values("final_reward", rewards)


def _add_lengths(statistics: StepStatistics, batch: Batch) -> None:
    lengths, correct = batch.cu_seqlens.diff(), batch.rewards > 0
    statistics.add_values("avg_seq_len", lengths)
    statistics.add_values("avg_prompt_len", batch.prompt_lens)
    statistics.add_values("correct_seq_len", lengths[correct])
    statistics.add_values("incorrect_seq_len", lengths[~correct])
    statistics.add_values("no_eos_ratio", batch.truncated.float())
    statistics.add_sum("n_seqs", batch.n_seqs)
    statistics.add_sum("n_tokens", len(batch.token_ids))
    statistics.add_sum("n_valid_tokens", batch.loss_mask.sum())


def _add_staleness(statistics: StepStatistics, batch: Batch) -> None:
    first = batch.cu_seqlens[:-1].long() + batch.prompt_lens
    last = batch.cu_seqlens[1:].long() - 1
    statistics.add_distribution("head_offpolicyness", (batch.version - batch.versions[first]).float())
    statistics.add_distribution("tail_offpolicyness", (batch.version - batch.versions[last]).float())


def _add_groups(statistics: StepStatistics, batch: Batch) -> None:
    ids, groups = torch.unique(batch.group_ids, return_inverse=True)
    highest = torch.full((len(ids),), -torch.inf).scatter_reduce_(0, groups, batch.rewards, "amax")
    lowest = torch.full((len(ids),), torch.inf).scatter_reduce_(0, groups, batch.rewards, "amin")
    statistics.add_values("groups_without_spread", (highest == lowest).float())
    statistics.add_values("pass_at_k", (highest > 0).float())


def _add_failures(statistics: StepStatistics, batch: Batch) -> None:
    failures = [rollout.reward_failure for group in batch.groups for rollout in group.rollouts]
    statistics.add_sum("reward_timeouts", failures.count("timeout"))
    statistics.add_sum("reward_errors", sum(f is not None for f in failures) - failures.count("timeout"))
