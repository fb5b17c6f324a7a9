"""Memory: what the process does with what tensors on the CPU gave back, and what a GPU has to spare."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for the next allocation; returns whether it could (glibc can).

    By default glibc maps each large block anew and gives it back when it is freed, so that every activation of every
    training step is paid for in page faults: a tenth of the time of a step.  The peak of the memory in use stays the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, LARGEST_INT) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def spare_gpu_bytes(device: torch.device) -> int:
    """Bytes of the GPU that large tensors could get now: free ones, and whole blocks that PyTorch holds without a tensor in them.

    Remainders of blocks are not counted: a large tensor does not fit into them, and looking for room costs more than it gives.
    """
    free, held = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_stats(device)
    used, remainders = held.get("allocated_bytes.all.current", 0), held.get("inactive_split_bytes.all.current", 0)
    return free + held.get("reserved_bytes.all.current", 0) - used - remainders
