"""check_data: what module and data module only know together, refused before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_lightning.modules.ppo_config import PPOConfig


def check_data(data: Any, ppo: PPOConfig, limits: Mapping[str, int], world_size: int) -> None:
    """Refuses batches that cannot be dealt equally, answers that may be too long, and options that miss something in the data.

    Args:
        data: a RolloutDataModule, or anything with some of its attributes.
        ppo: the module's.
        limits: by the name of the option, the longest sequence that it allows.
        world_size: trainer ranks.

    Raises:
        ValueError: names both options and the way out.
    """
    group_size, batch_size = getattr(data, "group_size", None), getattr(data, "batch_size", None)
    if group_size == 1 and ppo.estimator.mean_level == "group":
        name = "group_adv_norm=true" if ppo.group_adv_norm else f"advantage={ppo.advantage}"
        raise ValueError(
            f"ppo.{name} compares the answers to one prompt, but data group_size=1 gives one: "
            "raise group_size or choose another estimator"
        )
    if isinstance(group_size, int) and isinstance(batch_size, int):
        _check_shares(batch_size, group_size, ppo.n_minibatches, world_size)
    generation = getattr(data, "generation", None)
    _check_answer_limit(getattr(generation, "max_new_tokens", None), ppo)
    for name, limit in limits.items():
        _check_lengths(data, name, limit)


def _check_shares(batch_size: int, group_size: int, n_minibatches: int, world_size: int) -> None:
    if batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} prompts cannot be dealt equally to {world_size} trainer ranks: make it a multiple of them"
        )
    per_rank = batch_size // world_size * group_size
    if per_rank % n_minibatches:
        raise ValueError(
            f"batch_size={batch_size} and group_size={group_size} give each of {world_size} ranks {per_rank} answers, "
            f"which ppo.n_minibatches={n_minibatches} does not divide: change one of them"
        )


def _check_answer_limit(max_new_tokens: int | None, ppo: PPOConfig) -> None:
    needs = ppo.aggregation == "token-sum-norm" and ppo.token_sum_norm is None
    if max_new_tokens is None and needs:
        raise ValueError(
            "ppo.aggregation=token-sum-norm divides by data generation.max_new_tokens, which this data does not tell: "
            "set ppo.token_sum_norm"
        )
    if ppo.overlong_buffer is not None and (max_new_tokens is None or ppo.overlong_buffer > max_new_tokens):
        raise ValueError(
            f"ppo.overlong_buffer={ppo.overlong_buffer} counts the last tokens before data generation.max_new_tokens="
            f"{max_new_tokens}: make it smaller than that, or leave it at null"
        )


def _check_lengths(data: Any, name: str, limit: int) -> None:
    max_new_tokens = getattr(getattr(data, "generation", None), "max_new_tokens", 0)
    max_prompt_len = getattr(getattr(data, "prompts", None), "max_prompt_len", 1)
    if max_new_tokens + max_prompt_len > limit:
        raise ValueError(
            f"generation.max_new_tokens={max_new_tokens} after prompts of up to {max_prompt_len} tokens does not fit into "
            f"{name}={limit}: raise that to at least {max_new_tokens + max_prompt_len} or lower the others"
        )
