"""limit_cpu_threads: few threads for what the CPU does beside a GPU."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

MOST_THREADS = 8


def limit_cpu_threads() -> None:
    """At most 8 threads for a trainer's tensors on the CPU, unless OMP_NUM_THREADS names a number.

    PyTorch has one for each core, and wakes all of them for tensors of more than 32,768 elements, such as a number for each
    token of a batch. Each operation then waits for the slowest of them: beside engines and other trainers on 64 cores, a step of
    0.35 s (0.6B, 32,768 tokens, one H100) took 0.81 s.
    """
    threads = torch.get_num_threads()
    if threads > MOST_THREADS and "OMP_NUM_THREADS" not in os.environ:
        logger.info("the CPU's part of a step gets %d threads instead of %d; OMP_NUM_THREADS changes that", MOST_THREADS, threads)
        torch.set_num_threads(MOST_THREADS)
