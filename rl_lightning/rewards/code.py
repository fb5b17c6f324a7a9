"""CodeReward: the program in an answer must give the expected outputs."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from typing import Any

from rl_lightning.rewards.program import Program, ProgramLimits
from rl_lightning.types import Prompt

TOLERANCE = 1e-6

_FENCED = re.compile(r"```([\w+#.-]*)[ \t]*\n(.*?)```", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")
_INTEGER = re.compile(r"[+-]?\d+")

_FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)

PREAMBLE = """\
import json as _json, sys as _sys
_given, _out, _sys.stdout = _json.loads(_sys.stdin.read()), _sys.stdout, _sys.stderr
__name__ = "solution"
_sys.modules[__name__] = _sys.modules["__main__"]
from typing import *
from collections import *
from functools import *
from itertools import *
from heapq import *
from bisect import *
import collections, functools, itertools, heapq, bisect, math, random, re, string, sys
"""
"""Before a program of which a function is called: what it prints does not matter, and what it does as a script is not done."""

CALLER = """
_owner = Solution() if "Solution" in globals() else None
_fn = getattr(_owner, {name!r}, None) or globals()[{name!r}]
_out.write(_json.dumps(_fn(*_given)))
"""


class CodeReward:
    """`right` where the last fenced block of Python in the answer passes all cases of the prompt's `input_output`, else `wrong`.

    `input_output` holds `inputs` and `outputs`: texts on standard input and output, or, with `fn_name`, arguments and
    result of that function (top level, or a method of `Solution`).  Each case runs in a process of its own under limits
    (see `rewards/program.py` on what they protect from); the program never sees the expected outputs.

    Args:
        right: raw reward of a right answer.
        wrong: raw reward of any other.
        timeout_s: longest time for all cases together; keep it below the reward pool's deadline.
        memory_gb: memory of the program.
        max_cases: judge by the first so many cases only; null for all.
    """

    def __init__(
        self,
        right: float = 1.0,
        wrong: float = -1.0,
        timeout_s: float = 6.0,
        memory_gb: float = 1.0,
        max_cases: int | None = None,
    ) -> None:
        if timeout_s <= 0 or memory_gb <= 0 or (max_cases is not None and max_cases < 1):
            raise ValueError(
                f"need timeout_s > 0, memory_gb > 0 and max_cases >= 1, got {timeout_s=}, {memory_gb=}, {max_cases=}"
            )
        self.right = right
        self.wrong = wrong
        self.timeout_s = timeout_s
        self.memory_gb = memory_gb
        self.max_cases = max_cases

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """Runs the program on every case until one fails.

        Raises:
            ValueError: the prompt has no `input_output`.
        """
        cases = prompt.reference.get("input_output")
        if not cases:
            raise ValueError(f"CodeReward cannot score prompt {prompt.query_id!r}: it has no 'input_output'")
        code = last_code_block(answer)
        return self.right if code is not None and self._passes(code, cases) else self.wrong

    def _passes(self, code: str, cases: dict[str, Any]) -> bool:
        fn_name = cases.get("fn_name")
        source = code if fn_name is None else called(code, fn_name)
        as_input, same = (text_of, same_text) if fn_name is None else (arguments, same_value)
        deadline = time.monotonic() + self.timeout_s
        with Program(source, ProgramLimits(int(self.memory_gb * 2**30))) as program:
            for given, expected in list(zip(cases["inputs"], cases["outputs"], strict=True))[: self.max_cases]:
                output = program.run(as_input(given), max(0.0, deadline - time.monotonic()))
                if output is None or not same(output, expected):
                    return False
        return True


def last_code_block(answer: str) -> str | None:
    """The last complete fenced block of Python, or of no named language; None where there is none."""
    blocks: list[tuple[str, str]] = _FENCED.findall(answer)
    return next((code for language, code in reversed(blocks) if language.lower() in _PYTHON), None)


def called(code: str, name: str) -> str:
    """A program that calls the function `name` of `code` with the arguments on standard input, and prints its result."""
    first = "".join(_FUTURE.findall(code))  # Python wants these before anything else
    return first + PREAMBLE + _FUTURE.sub("", code) + CALLER.format(name=name)


def arguments(given: Any) -> str:
    """JSON list of a function's arguments; a text holds one JSON value a line."""
    if isinstance(given, str):
        return f"[{','.join(line for line in given.splitlines() if line.strip())}]"
    return json.dumps(given)


def text_of(value: Any) -> str:
    """Standard input or output as text; a list holds its lines."""
    if isinstance(value, list):
        return "\n".join(text_of(line) for line in value)
    return value if isinstance(value, str) else json.dumps(value)


def same_text(output: str, expected: Any) -> bool:
    """Equal line by line but for spaces at the ends of lines, or else word by word with numbers to 1e-6, integers exactly."""
    lines, wanted = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (output, text_of(expected)))
    if lines == wanted:
        return True
    words, wanted = output.split(), text_of(expected).split()
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    try:
        if _INTEGER.fullmatch(word) and _INTEGER.fullmatch(wanted):
            return int(word) == int(wanted)
        return _close(float(word), float(wanted))
    except ValueError:
        return False


def _close(value: float, wanted: float) -> bool:
    try:
        return math.isclose(value, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # an integer beyond all floats
        return False


def same_value(output: str, expected: Any) -> bool:
    """Whether the JSON text `output` is the expected value, which may itself be JSON text or wrapped in a list of one."""
    try:
        value = json.loads(output)
    except ValueError:
        return False
    wanted = [expected]
    if isinstance(expected, str):
        with contextlib.suppress(ValueError):
            wanted.append(json.loads(expected))
    return any(_alike(value, want) or _alike([value], want) for want in wanted)


def _alike(value: Any, wanted: Any) -> bool:
    if isinstance(value, float) and isinstance(wanted, int | float):
        return _close(value, wanted)
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_alike, value, wanted))
    return bool(value == wanted)
