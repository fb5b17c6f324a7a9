"""Small prompts, rewards and answers that tests share; importable in other processes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from rl_lightning.types import Prompt


class LetterPrompts:
    """`abc=` and the like."""

    def __init__(self, size: int = 32) -> None:
        self.size = size

    def setup(self, tokenizer: Any) -> None:
        rng = random.Random(0)
        self.texts = ["".join(rng.choice("abcdefghij") for _ in range(3)) + "=" for _ in range(self.size)]
        self.ids = [tuple(ids) for ids in tokenizer(self.texts, add_special_tokens=False)["input_ids"]]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Prompt:
        return Prompt(str(i), self.texts[i], self.ids[i])


def share_of_even_digits(prompt: Prompt, answer: str) -> float:
    """A reward that a tiny random model learns in a few steps."""
    return sum(c in "02468" for c in answer) / max(1, len(answer))


def always_wrong(prompt: Prompt, answer: str) -> float:
    """-1."""
    return -1.0


def acknowledge(signal: str | None, error: Exception | None = None) -> float:
    """An engine's answer: at once, or when `signal` is there."""
    deadline = time.monotonic() + 60
    while signal is not None and not Path(signal).exists():
        assert time.monotonic() < deadline, "nobody was told of the fast engine"
        time.sleep(0.01)
    if error is not None:
        raise error
    return 0.5
