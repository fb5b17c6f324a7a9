"""A benchmark's turn measures the steps it is told to, and says why where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from turn import TurnError, take_turn  # noqa: E402

PROGRAM = f"""
import sys, time
sys.path.append({str(BENCHMARKS)!r})
from echo_task import StepReporter
reporter = StepReporter(torch="2.0", threads=1)
print("something else")
for step in range(int(sys.argv[1])):
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    reporter.step(100 * step, 0.5, wait_s=0.0)
exec(sys.argv[2])
"""


def program(steps: int, then: str = "") -> list[str]:
    """A system that takes 0.05 CPU seconds for each of its steps."""
    return [sys.executable, "-c", PROGRAM, str(steps), then]


def test_measures_the_steps_after_the_warmup() -> None:
    turn = take_turn(program(6), warmup=2, steps=3, timeout_s=60)
    assert [step["step"] for step in turn.steps] == [3, 4, 5]
    assert turn.about == {"torch": "2.0", "threads": 1}
    seconds = sum(step["seconds"] for step in turn.steps)
    assert turn.tokens_per_s == pytest.approx((200 + 300 + 400) / seconds)
    assert turn.step_s == pytest.approx(seconds / 3)
    assert 0.1 < turn.cpu_s <= seconds + 0.1


def test_a_system_that_fails_says_why() -> None:
    with pytest.raises(TurnError, match=r"ended with code 1; its output ends: (?s:.*)RuntimeError: no memory"):
        take_turn(program(2, "raise RuntimeError('no memory')"), warmup=1, steps=3, timeout_s=60)


def test_a_system_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    start_another = (
        f"import subprocess; p = subprocess.Popen(['sleep', '1000']); open({str(file)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    with pytest.raises(TurnError, match="did not end within 5 s"):
        take_turn(program(1, start_another), warmup=1, steps=3, timeout_s=5)
    pid = int(file.read_text())
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    assert not psutil.pid_exists(pid)
