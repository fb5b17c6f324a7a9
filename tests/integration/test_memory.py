"""Freed memory is kept: training steps that repeat cause next to no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from rl_lightning.models.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(5)
def step():
    x = torch.ones(16 << 20)
    for _ in range(3):
        x = x * 2
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int | None:
    """Of eight steps that allocate 64 MiB four times; None where the C library has no such setting."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=120)
    return int(run.stdout) if run.returncode != 5 else None


def test_repeated_steps_cause_few_page_faults() -> None:
    kept, given_back = page_faults("keep"), page_faults("give back")
    if kept is None:
        pytest.skip("this C library cannot be told to keep memory")
    assert given_back is not None
    # One block may still move to fresh memory when a small allocation has cut the old one.
    assert kept * 8 < given_back
