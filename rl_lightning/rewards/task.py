"""TaskReward: each prompt is scored by the reward of its task, for data that mixes tasks."""

from __future__ import annotations

from collections.abc import Callable

from rl_lightning.rewards.code import CodeReward
from rl_lightning.rewards.math import MathReward
from rl_lightning.rewards.reward import Reward
from rl_lightning.types import Prompt


class TaskReward:
    """MathReward for `math` and `stem`, CodeReward for `code`.

    Args:
        rewards: rewards of further tasks, or others for these, by task.
    """

    def __init__(self, rewards: dict[str, Reward | Callable[[Prompt, str], float]] | None = None) -> None:
        self.rewards: dict[str, Reward | Callable[[Prompt, str], float]] = {
            "math": MathReward(),
            "stem": MathReward(),
            "code": CodeReward(),
            **(rewards or {}),
        }

    def setup(self) -> None:
        """Sets up the rewards of all tasks."""
        for reward in self.rewards.values():
            getattr(reward, "setup", lambda: None)()

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """The score by the prompt's task.

        Raises:
            ValueError: no reward is known for that task.
        """
        if prompt.task not in self.rewards:
            raise ValueError(
                f"TaskReward knows no reward for task {prompt.task!r} of prompt {prompt.query_id!r}, only for "
                f"{', '.join(self.rewards)}; add it to its rewards"
            )
        return self.rewards[prompt.task](prompt, answer)
