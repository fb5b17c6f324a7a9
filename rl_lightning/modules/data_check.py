"""check_data: what module and data module only know together, refused before anything is generated."""

from __future__ import annotations

from typing import Any

from rl_lightning.modules.ppo_config import PPOConfig


def check_data(data: Any, ppo: PPOConfig, max_tokens_per_mb: int, world_size: int) -> None:
    """Refuses batches that cannot be dealt equally, and answers that may be longer than a micro-batch.

    Args:
        data: a RolloutDataModule, or anything with some of its attributes.
        ppo: the module's.
        max_tokens_per_mb: the module's.
        world_size: trainer ranks.

    Raises:
        ValueError: names both options and the way out.
    """
    group_size, batch_size = getattr(data, "group_size", None), getattr(data, "batch_size", None)
    if group_size == 1 and ppo.group_adv_norm:
        raise ValueError(
            "ppo.group_adv_norm=true compares the answers to one prompt, but data group_size=1 gives one: "
            "raise group_size or turn group_adv_norm off"
        )
    if isinstance(group_size, int) and isinstance(batch_size, int):
        _check_shares(batch_size, group_size, ppo.n_minibatches, world_size)
    _check_lengths(data, min(max_tokens_per_mb, ppo.recompute_max_tokens_per_mb or max_tokens_per_mb))


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


def _check_lengths(data: Any, max_tokens: int) -> None:
    max_new_tokens = getattr(getattr(data, "generation", None), "max_new_tokens", 0)
    max_prompt_len = getattr(getattr(data, "prompts", None), "max_prompt_len", 1)
    if max_new_tokens + max_prompt_len > max_tokens:
        raise ValueError(
            f"generation.max_new_tokens={max_new_tokens} after prompts of up to {max_prompt_len} tokens does not fit into "
            f"max_tokens_per_mb={max_tokens}: raise that to at least {max_new_tokens + max_prompt_len} or lower the others"
        )
