"""Where and when numbers were made, from what code."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def circumstances() -> dict[str, Any]:
    """Date, commit, machine and Python version of this process."""
    git = ["git", "-C", str(HERE)]
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False).stdout
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("+changes" if changed else ""),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {names[0].partition(': ')[2] if names else platform.processor()}",
        "python": platform.python_version(),
    }
