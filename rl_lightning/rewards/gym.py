"""GymReward: reasoning-gym's own verifiers for the prompts of GymPrompts."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

from rl_lightning.prompts.gym import gym_dataset, import_gym
from rl_lightning.rewards.extract import first_line, last_boxed, tagged
from rl_lightning.types import Prompt

Extract = Literal["all", "first_line", "tag", "boxed"]

VERIFIER_STUMBLES = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, RecursionError)
"""What a verifier raises on an answer that it cannot read; such an answer is a wrong one."""


class GymReward:
    """The verifier's score s in [0, 1] as `wrong + s * (right - wrong)`.

    Args:
        extract: the part of the answer that is judged: `all` of it, the `first_line`, the last `<answer>` `tag`, or the last
            `boxed` LaTeX expression. An answer without such a part scores as the verifier scores no answer.
        right: raw reward of score 1.
        wrong: raw reward of score 0.
    """

    def __init__(self, extract: Extract = "all", right: float = 1.0, wrong: float = -1.0) -> None:
        if extract not in ("all", "first_line", "tag", "boxed"):
            raise ValueError(f"extract={extract!r} must be all, first_line, tag or boxed")
        self.extract = extract
        self.right = right
        self.wrong = wrong

    def setup(self) -> None:
        """Imports reasoning-gym, which takes seconds."""
        import_gym()

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """Scores `answer` to a prompt of GymPrompts.

        Raises:
            ValueError: the prompt is not one of GymPrompts.
        """
        if "gym" not in prompt.reference:
            raise ValueError(f"GymReward cannot score prompt {prompt.query_id!r}: it does not come from GymPrompts")
        source = prompt.reference["gym"]
        dataset = gym_dataset(source["task"], source["seed"], source["size"], source["options"])
        entry = _entry(source["task"], source["seed"], source["size"], json.dumps(source["options"]), source["item"])
        try:
            score = float(dataset.score_answer(self._extracted(answer), entry))
        except VERIFIER_STUMBLES:
            score = 0.0
        return self.wrong + score * (self.right - self.wrong)

    def _extracted(self, answer: str) -> str | None:
        if self.extract == "first_line":
            return first_line(answer)
        if self.extract == "tag":
            return tagged(answer)
        if self.extract == "boxed":
            return last_boxed(answer)
        return answer.strip()


@lru_cache(maxsize=4)
def _entry(task: str, seed: int, size: int, frozen_options: str, item: int) -> dict[str, Any]:
    return gym_dataset(task, seed, size, json.loads(frozen_options))[item]
