"""collate: finished rollout groups become one flat batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rl_lightning.types import Batch, Rollout, RolloutGroup


def collate(groups: Sequence[RolloutGroup], *, version: int = 0, wait_s: float = 0.0) -> Batch:
    """Puts all sequences (prompt and answer) of `groups` end to end, in order.

    Args:
        groups: at least one; every answer has at least one token.
        version: the trainer's version now.
        wait_s: seconds that were spent waiting for the groups.

    Raises:
        ValueError: there is nothing to train on, or an answer is empty.
    """
    rows = [(group, rollout) for group in groups for rollout in group.rollouts]
    if not rows:
        raise ValueError("a batch needs at least one rollout, but no group holds any")
    for group, rollout in rows:
        if not len(rollout.completion):
            raise ValueError(f"an answer to prompt {group.prompt.query_id!r} (group {group.index}) has no tokens")
    prompt_lens = [len(group.prompt.token_ids) for group, _ in rows]
    lengths = [n + len(rollout.completion) for n, (_, rollout) in zip(prompt_lens, rows, strict=True)]
    return Batch(
        token_ids=_flat(_tokens(rows), np.int64),
        cu_seqlens=torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32),
        prompt_lens=torch.tensor(prompt_lens, dtype=torch.int32),
        group_ids=torch.tensor([group.index for group, _ in rows], dtype=torch.int64),
        loss_mask=_flat(_padded(rows, lambda r: r.loss_mask, False), np.bool_),
        behav_logprobs=_flat(_padded(rows, lambda r: r.completion.logprobs, 0.0), np.float32),
        versions=_flat(_padded(rows, lambda r: r.completion.versions, -1), np.int32),
        rewards=torch.tensor([rollout.reward for _, rollout in rows], dtype=torch.float32),
        truncated=torch.tensor([rollout.completion.finish_reason == "length" for _, rollout in rows]),
        groups=tuple(groups),
        version=version,
        wait_s=wait_s,
    )


def _tokens(rows: Sequence[tuple[RolloutGroup, Rollout]]) -> Iterator[np.ndarray]:
    for group, rollout in rows:
        yield np.asarray(group.prompt.token_ids)
        yield rollout.completion.token_ids


def _padded(
    rows: Sequence[tuple[RolloutGroup, Rollout]], field: Callable[[Rollout], np.ndarray], off_answer: float
) -> Iterator[np.ndarray]:
    for group, rollout in rows:
        yield np.full(len(group.prompt.token_ids), off_answer)
        yield field(rollout)


def _flat(parts: Iterator[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=dtype) for part in parts]))
