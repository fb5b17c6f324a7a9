"""Answers of lognormal length to random prompts: a task for models with random weights.

Those end one answer in some hundred by themselves, as each of 150,000 tokens is about as likely as the end.  Lengths are upper
bounds for that, and no `min_new_tokens`: engines pay for it with every token, and training does not ask for it.
"""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np

from rl_lightning.rollout.workflow import sample_seed
from rl_lightning.types import GenerationRequest, Lease, Prompt, Rollout, RolloutGroup

PROMPT_TOKENS = 128
CHARACTER_IDS = range(3, 48)
"""Token ids of the characters in `character_tokenizer`."""


class RandomPrompts:
    """Prompts of 128 random tokens, each a function of its number.

    Args:
        size: how many.
    """

    max_prompt_len = PROMPT_TOKENS

    def __init__(self, size: int) -> None:
        self.size = size

    def setup(self, tokenizer: Any, /) -> None:
        """Nothing is read."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int, /) -> Prompt:
        return Prompt(str(i), "", tuple(random.Random(i).choices(CHARACTER_IDS, k=PROMPT_TOKENS)))


class LongTail:
    """A workflow whose answers have lengths drawn from a lognormal distribution: a function of (seed, group, answer).

    Args:
        median: of the length in tokens.
        sigma: of its logarithm.
        longest: most tokens.
    """

    def __init__(self, median: int, sigma: float, longest: int) -> None:
        self.median, self.sigma, self.longest = median, sigma, longest

    def length(self, seed: int) -> int:
        """Tokens of the answer with this seed."""
        drawn = self.median * math.exp(self.sigma * np.random.default_rng(seed).standard_normal())
        return max(1, min(self.longest, round(drawn)))

    async def run(self, lease: Lease, engine: Any, score: Any, decode: Any) -> RolloutGroup:
        """See `Workflow.run`. Rewards are parities: they have spread, and nothing is learnt."""

        async def answer(sample: int) -> Any:
            seed = sample_seed(lease.seed, lease.index, sample)
            length = self.length(seed)
            params = replace(lease.params, max_new_tokens=length)
            name = f"train-{lease.index}-{lease.submission}-{sample}"
            return await engine.generate(GenerationRequest(name, lease.prompt.token_ids, params, seed))

        completions = await asyncio.gather(*(answer(i) for i in range(lease.group_size)))
        rollouts = tuple(Rollout(c, "", float(c.token_ids.sum() % 2), {}, np.ones(len(c), dtype=bool)) for c in completions)
        return RolloutGroup(lease.index, lease.prompt, rollouts)


def no_reward(prompt: Prompt, answer: str) -> float:
    """The workflow scores."""
    return 0.0
