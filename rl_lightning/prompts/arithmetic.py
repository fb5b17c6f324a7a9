"""ArithmeticPrompts: few-shot sums that a small pre-trained model half knows, to see learning within minutes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from rl_lightning.prompts.tokenizer import encode_texts
from rl_lightning.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class ArithmeticPrompts:
    r"""`3+4=7\n1+5=6\n9+2=11\n8+6=`: a few solved examples, then another question; the answer is a number on a line.

    SmolLM2-135M answers a fifth of the one-digit sums right when sampled.
    Item i is a pure function of (seed, i). Score it with `ExactMatchReward(first_line=True)`.

    Args:
        digits: digits of both operands, exactly; none is 0.
        shots: solved examples before the question.
        operator: `+`, `-` or `*`.
        size: number of prompts.
        seed: a validation set takes another seed than the training set.
    """

    def __init__(
        self, digits: int = 1, shots: int = 3, operator: Literal["+", "-", "*"] = "+", size: int = 1024, seed: int = 0
    ) -> None:
        if digits < 1 or shots < 0 or size < 1:
            raise ValueError(f"need digits >= 1, shots >= 0 and size >= 1, got digits={digits}, shots={shots}, size={size}")
        if operator not in OPERATIONS:
            raise ValueError(f"operator={operator!r} must be one of {', '.join(OPERATIONS)}")
        self.digits = digits
        self.shots = shots
        self.operator = operator
        self.size = size
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def setup(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keeps the tokenizer; items are made when they are asked for."""
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Prompt:
        if not 0 <= i < self.size:
            raise IndexError(f"prompt {i} of {self.size}")
        assert self._tokenizer is not None, "setup() comes first"
        text, answer = self.question(i)
        return Prompt(
            query_id=f"arithmetic-{self.seed}-{i}",
            text=text,
            token_ids=tuple(encode_texts(self._tokenizer, [text])[0]),
            task="arithmetic",
            reference={"answer": answer},
        )

    def question(self, i: int) -> tuple[str, str]:
        """Text and answer of item `i`."""
        rng = random.Random(f"{self.seed}/{i}")
        numbers = range(10 ** (self.digits - 1), 10**self.digits)
        question = (rng.choice(numbers), rng.choice(numbers))
        examples: list[tuple[int, int]] = []
        while len(examples) < self.shots:
            pair = (rng.choice(numbers), rng.choice(numbers))
            if pair != question:
                examples.append(pair)
        solved = "".join(f"{self._asked(pair)}{self._answer(pair)}\n" for pair in examples)
        return solved + self._asked(question), self._answer(question)

    def _asked(self, pair: tuple[int, int]) -> str:
        return f"{pair[0]}{self.operator}{pair[1]}="

    def _answer(self, pair: tuple[int, int]) -> str:
        return str(OPERATIONS[self.operator](*pair))
