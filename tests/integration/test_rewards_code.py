from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rl_lightning.rewards.code import CodeReward, arguments, last_code_block, same_text, same_value
from rl_lightning.rewards.exact import exact_match
from rl_lightning.rewards.task import TaskReward
from rl_lightning.types import Prompt
from tests.reward_samples import is_gone

ADD = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
SORTED = {"fn_name": "order", "inputs": [[[3, 1, 2]], "[2, 1]"], "outputs": [[1, 2, 3], "[1, 2]"]}


def score(code: str, cases: dict[str, Any], **settings: Any) -> float:
    answer = f"First `x`, then\n```python\nwrong(\n```\nno:\n```python\n{code}\n```\nDone."
    return CodeReward(**settings)(Prompt("q", "t", (1,), "code", {"input_output": cases}), answer)


@pytest.mark.parametrize(
    ("code", "cases"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", ADD),
        ("def main():\n    print(sum(map(float, input().split())))\nif __name__ == '__main__':\n    main()", ADD),
        ("def order(xs):\n    print('noise')\n    return sorted(xs)", SORTED),
        ("def order(xs):\n    return sorted(xs)\n\nprint('For example', order([3, 1]))", SORTED),
        ("def order(xs):\n    return sorted(xs)\n\nif __name__ == '__main__':\n    print(order(eval(input())))", SORTED),
        ("from __future__ import annotations\n\ndef order(xs: list[int]) -> list[int]:\n    return sorted(xs)", SORTED),
        ("class Solution:\n    def order(self, xs: List[int]) -> List[int]:\n        return sorted(xs)", SORTED),
        ("def order(xs):\n    return [x + 1e-9 for x in sorted(xs)]", {**SORTED, "outputs": [[[1, 2, 3]], [1, 2]]}),
    ],
)
def test_right_programs(code: str, cases: dict[str, Any]) -> None:
    assert score(code, cases) == 1.0


@pytest.mark.parametrize(
    ("code", "cases"),
    [
        ("print(3)", ADD),
        ("raise SystemExit(1)", ADD),
        ("def sort(xs):\n    return xs", SORTED),
        ("def order(xs):\n    return xs", SORTED),
        ("x = bytearray(2 ** 31)\na, b = map(int, input().split())\nprint(a + b)", ADD),
        ("while True:\n    print('x' * 10000)", ADD),
        ("import os\nprint(open('/proc/self/environ').read(), os.environ['SECRET'])", {"inputs": [""], "outputs": ["hush"]}),
    ],
)
def test_wrong_programs(code: str, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    assert score(code, cases) == -1.0


def test_a_program_that_hangs_is_wrong_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
import subprocess, time
child = subprocess.Popen(["sleep", "60"])
open({str(note)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    began = time.monotonic()
    assert score(code, ADD, timeout_s=0.5) == -1.0
    assert time.monotonic() - began < 5
    assert is_gone(int(note.read_text()))


def test_a_program_leaves_no_process_in_a_session_of_its_own(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
import subprocess
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
open({str(note)!r}, "w").write(str(child.pid))
print(3)
"""
    assert score(code, {"inputs": [""], "outputs": ["3"]}) == 1.0
    assert is_gone(int(note.read_text()))


def test_max_cases_and_settings() -> None:
    assert score("print(3)", ADD, max_cases=1, right=5.0) == 5.0
    with pytest.raises(ValueError, match="max_cases=0"):
        CodeReward(max_cases=0)
    with pytest.raises(ValueError, match="no 'input_output'"):
        CodeReward()(Prompt("q", "t", (1,), "code"), "")


def test_answers_without_code_are_wrong() -> None:
    assert last_code_block("print(3)") is None and last_code_block("```\nx\n```") == "x\n"
    assert last_code_block("```cpp\nint x;\n```\nno Python\n```bash\nls\n```") is None
    assert CodeReward()(Prompt("q", "t", (1,), "code", {"input_output": ADD}), "print(3)") == -1.0


def test_blocks_in_other_languages_are_no_programs() -> None:
    example, shell = "```text\n1 2\n```", "```bash\npython add.py\n```"
    assert last_code_block(f"For\n{example}\nthis works:\n```Python\nprint(3)\n```\nRun it:\n{shell}\nDone.") == "print(3)\n"


def test_comparison() -> None:
    assert same_text("a  \nb\n\n", "a\nb") and same_text("0.3000000001", "0.3") and same_text("1 2", ["1", "2"])
    assert not same_text("a", "b") and not same_text("1", "1 1")
    assert same_text("+7 007", "7 7") and not same_text("1000000008", "1000000007") and not same_text("1" * 400, "2" * 400)
    assert same_value("true", True) and same_value('"x"', "x") and same_value("[[1]]", [[1]]) and same_value("1", "1")
    assert not same_value("oops", None) and not same_value("1", 2) and not same_value("1.5", 10**400)
    assert json.loads(arguments('[1]\n"a"\n')) == [[1], "a"] and arguments([1, 2]) == "[1, 2]"


def test_each_task_has_its_reward() -> None:
    reward = TaskReward({"trivia": exact_match})
    reward.setup()
    tasks = {"math": {"solutions": ["4"]}, "stem": {"solutions": ["4"]}, "code": {"input_output": ADD}, "trivia": {"answer": "4"}}
    scores = {task: reward(Prompt("q", "t", (1,), task, reference), "4") for task, reference in tasks.items()}
    assert scores == {"math": 1.0, "stem": 1.0, "code": -1.0, "trivia": 1.0}
    with pytest.raises(ValueError, match="no reward for task 'poetry'"):
        reward(Prompt("q", "t", (1,), "poetry"), "4")
