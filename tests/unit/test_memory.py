"""Freed memory is kept: training steps that repeat cause no page faults."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from rl_lightning.models.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(5)
def step():
    x = torch.ones(4 << 20)
    for _ in range(3):
        x = x * 2
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int | None:
    """Of five steps that allocate 16 MiB four times; None where the C library has no such setting."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=120)
    return int(run.stdout) if run.returncode != 5 else None


def test_repeated_steps_cause_no_page_faults() -> None:
    kept = page_faults("keep")
    assert kept is None or kept < 100
