"""Random rollout batches of chosen lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_lightning.batching.collate import collate
from rl_lightning.types import Batch, Completion, Prompt, Rollout, RolloutGroup


def random_batch(lengths: Sequence[int], *, vocabulary: int, prompt: int = 128, group_size: int = 1, seed: int = 0) -> Batch:
    """One sequence of each of `lengths` tokens run (one more is only predicted); prompts take at most half of a sequence."""
    rng, groups = np.random.default_rng(seed), []
    for index in range(0, len(lengths), group_size):
        members = lengths[index : index + group_size]
        n_prompt = min(prompt, max(1, min(members) // 2))
        question = Prompt(f"q{index}", "", tuple(rng.integers(0, vocabulary, n_prompt).tolist()))
        groups.append(RolloutGroup(index, question, tuple(_rollout(rng, n + 1 - n_prompt, vocabulary) for n in members)))
    return collate(groups)


def group_batch(n_groups: int, group_size: int, n_prompt: int, n_answer: int, *, vocabulary: int, seed: int = 0) -> Batch:
    """Groups of answers of `n_answer` tokens to prompts of `n_prompt`."""
    rng, groups = np.random.default_rng(seed), []
    for index in range(n_groups):
        question = Prompt(f"q{index}", "", tuple(rng.integers(0, vocabulary, n_prompt).tolist()))
        groups.append(RolloutGroup(index, question, tuple(_rollout(rng, n_answer, vocabulary) for _ in range(group_size))))
    return collate(groups)


def _rollout(rng: np.random.Generator, n: int, vocabulary: int) -> Rollout:
    tokens = rng.integers(0, vocabulary, n).astype(np.int32)
    logprobs = np.full(n, -np.log(vocabulary), np.float32)
    completion = Completion(tokens, logprobs, np.zeros(n, np.int32), "stop")
    return Rollout(completion, "", float(rng.choice([-1, 1])), {}, np.ones(n, dtype=bool))
