r"""MathReward: mathematical equality of the answer's last `\boxed{}` with a solution.

Nearly all answers are settled without a computer algebra system: equal texts, or two integers.  math-verify (sympy)
judges the rest.  It runs alarms, which work in a process's main thread only; elsewhere it has no time limit, which is
one of the reasons why rewards run in processes of their own (`rewards/pool.py`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rl_lightning.rewards.extract import last_boxed
from rl_lightning.types import Prompt

TIME_LIMIT_S = 2
LONGEST_EXPRESSION = 1000
LARGEST_EXPONENT = 1_000_000
LARGEST_FACTORIAL = 10_000

_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\displaystyle|[\s$]|~")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?\.?")
_DECIMAL = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_RATIO = re.compile(r"([+-]?)(?:\\frac\{([+-]?\d+)\}\{(\d+)\}|\\frac(\d)(\d)|(\d+)/(\d+))")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_TOWER = re.compile(r"\d+(?:\^\d+)+")
_JUXTAPOSED = re.compile(r"[})]\s*(?=[{(]*\d)|(?<=\d)\s+(?=\d)")
_FACTORIAL = re.compile(r"(\d+)!")


class MathReward:
    r"""`right` where the answer equals one of the prompt's `solutions` mathematically, else `wrong`.

    Args:
        right: raw reward of a right answer.
        wrong: raw reward of any other.
        require_boxed: an answer without `\boxed{}` is wrong. Off, the last expression in it is judged.
    """

    def __init__(self, right: float = 1.0, wrong: float = -1.0, require_boxed: bool = False) -> None:
        self.right = right
        self.wrong = wrong
        self.require_boxed = require_boxed

    def setup(self) -> None:
        """Imports math-verify, which takes seconds."""
        import math_verify  # noqa: F401

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """Compares.

        Raises:
            ValueError: the prompt has no `solutions`.
        """
        solutions = prompt.reference.get("solutions")
        if not solutions:
            raise ValueError(f"MathReward cannot score prompt {prompt.query_id!r}: it has no 'solutions'")
        if self.require_boxed and last_boxed(answer) is None:
            return self.wrong
        return self.right if math_score(answer, solutions) > 0 else self.wrong


def math_score(answer: str, solutions: Sequence[str]) -> float:
    r"""1.0 where `answer` equals one of `solutions`, else 0.0.

    Args:
        answer: a whole answer; its last `\boxed{}` counts, or without one its last expression.
        solutions: each a LaTeX expression, or a text with the expression in `\boxed{}`.
    """
    return float(any(_equal(answer, solution) for solution in solutions))


def _equal(answer: str, solution: str) -> bool:
    boxed, gold = last_boxed(answer), expression(solution)
    given = answer.strip() if boxed is None else boxed
    settled = _settled(plain(given), plain(gold))
    if settled is not None:
        return settled
    if boxed is None:
        return _verified(gold, answer[-LONGEST_EXPRESSION:])
    return len(boxed) <= LONGEST_EXPRESSION and _verified(gold, rf"\boxed{{{boxed}}}")


def expression(solution: str) -> str:
    r"""The expression in `solution`: what its last `\boxed{}` holds, else all of it."""
    boxed = last_boxed(solution)
    return solution.strip() if boxed is None else boxed


def plain(latex: str) -> str:
    """`latex` without what does not change its meaning: spaces, dollars, sizes, text markers, a final full stop."""
    text = _TEXT.sub(r"\1", latex.strip())
    text = _DROPPED.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").removesuffix(".")
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def number(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, ratio or `\frac{}{}`; None for anything else."""
    if len(text) > LONGEST_EXPRESSION:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    top, bottom = (int(digits) for digits in match.groups()[1:] if digits)
    return None if bottom == 0 else Fraction(-top if match[1] == "-" else top, bottom)


def _settled(given: str, gold: str) -> bool | None:
    """Whether they are equal, where that needs no algebra; None where it does."""
    if given == gold:
        return bool(gold)
    left, right = number(given), number(gold)
    if left is None or right is None:
        return None
    if left == right:
        return True
    # Two different integers are different; 0.333333 and 1/3 are left to math-verify and its rounding.
    return False if left.denominator == right.denominator == 1 else None


def _verified(gold: str, given: str) -> bool:
    if explodes(gold) or explodes(given):
        return False
    from math_verify import verify

    limit = _time_limit()
    return bool(verify(_parsed_gold(gold, limit), _parsed(given, limit), timeout_seconds=limit))


@lru_cache(maxsize=256)
def _parsed_gold(gold: str, limit: int | None) -> list[Any]:
    return _parsed(gold if "$" in gold.replace(r"\$", "") else rf"\boxed{{{gold}}}", limit)


def _parsed(text: str, limit: int | None) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=limit))


def _time_limit() -> int | None:
    return TIME_LIMIT_S if threading.current_thread() is threading.main_thread() else None


def explodes(text: str) -> bool:
    """Whether `text` writes a number that no machine should be asked to spell out, such as 3^{3^{3^{3}}}."""
    bare = re.sub(r"[{}()\s]", "", _JUXTAPOSED.sub("*", text))
    factorials = (int(digits) for digits in _FACTORIAL.findall(bare) if len(digits) < LONGEST_EXPRESSION)
    return any(n > LARGEST_FACTORIAL for n in factorials) or any(_tall(tower) for tower in _TOWER.findall(bare))


def _tall(tower: str) -> bool:
    exponent = 1
    for digits in reversed(tower.split("^")[1:]):
        base = int(digits) if len(digits) <= len(str(LARGEST_EXPONENT)) else LARGEST_EXPONENT + 1
        if base > LARGEST_EXPONENT or (base > 1 and exponent > 20):
            return True
        exponent = base**exponent
        if exponent > LARGEST_EXPONENT:
            return True
    return False
