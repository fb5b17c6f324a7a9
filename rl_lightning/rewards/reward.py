"""Reward: a number for an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rl_lightning.types import Prompt


@runtime_checkable
class Reward(Protocol):
    """Scores one answer. A plain function `(prompt, answer) -> float` is one too.

    Called in a separate process with a memory limit and a deadline (`rewards/pool.py`): it may be slow, crash or eat
    memory without harm to the run, it must be picklable, and it keeps no state between calls.  An optional method
    `setup()` runs once in each process, outside the deadline and the memory limit: the place for slow imports.
    """

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """The raw reward of `answer` (decoded text without the prompt)."""
        ...


@dataclass(frozen=True)
class WeightedReward:
    """One term of the reward sum.

    Args:
        reward: a Reward instance or a function `(prompt, answer) -> float`, by import path in YAML.
        weight: its factor in the sum.
    """

    reward: Reward | Callable[[Prompt, str], float]
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The function's or the class's name, as the statistics show it."""
        return getattr(self.reward, "__name__", type(self.reward).__name__)
