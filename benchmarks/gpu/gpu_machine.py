"""Where and when numbers of GPUs were made, from what code."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

from circumstances import circumstances

VERSIONS = ("torch", "ray", "transformers", "lightning", "sglang")


def describe_machine(program: str, n_gpus: int) -> dict[str, Any]:
    """Date, commit (from COMMIT where the code is a copy), machine, versions, and the command that was given.

    Args:
        program: file of this folder.
        n_gpus: how many are used; 0 names the CPU.
    """
    import torch

    here = circumstances()
    if n_gpus and torch.cuda.is_available():
        here["machine"] = f"{n_gpus} x {torch.cuda.get_device_name(0)}"
    if "COMMIT" in os.environ:
        here["commit"] = os.environ["COMMIT"]
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {**here, "command": f"python benchmarks/gpu/{program} {' '.join(sys.argv[1:])}".strip(), "versions": versions}
