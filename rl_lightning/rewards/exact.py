"""ExactMatchReward: the answer is the expected text, or it is not."""

from __future__ import annotations

from collections.abc import Sequence

from rl_lightning.rewards.extract import first_line
from rl_lightning.types import Prompt


class ExactMatchReward:
    """`right` where the stripped answer equals the prompt's `answer` or one of its `solutions`, else `wrong`.

    Args:
        right: raw reward of a right answer.
        wrong: raw reward of any other.
        first_line: judge the answer's first line that is not blank, and ignore what follows it.
        ignore_case: compare without regard to case.
    """

    def __init__(self, right: float = 1.0, wrong: float = -1.0, first_line: bool = False, ignore_case: bool = False) -> None:
        self.right = right
        self.wrong = wrong
        self.first_line = first_line
        self.ignore_case = ignore_case

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """Compares.

        Raises:
            ValueError: the prompt has neither `answer` nor `solutions`.
        """
        given = self._comparable(first_line(answer) if self.first_line else answer)
        return self.right if any(given == self._comparable(text) for text in expected(prompt)) else self.wrong

    def _comparable(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


def exact_match(prompt: Prompt, answer: str) -> float:
    """+1 where the stripped answer equals the prompt's `answer` or one of its `solutions`, else -1."""
    return ExactMatchReward()(prompt, answer)


def expected(prompt: Prompt) -> Sequence[str]:
    """The texts that count as right.

    Raises:
        ValueError: the prompt names none.
    """
    reference = prompt.reference
    if reference.get("answer") is not None:
        return [str(reference["answer"])]
    if not reference.get("solutions"):
        raise ValueError(f"prompt {prompt.query_id!r} has neither 'answer' nor 'solutions' to compare with")
    return list(reference["solutions"])
