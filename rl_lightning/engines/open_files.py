"""raise_open_files: as many open files as an engine needs."""

from __future__ import annotations

import resource

ENOUGH = 65536


def raise_open_files() -> None:
    """Lifts this process's limit of open files, and with it that of processes that it starts, as far as the machine allows.

    Each request in flight has a connection, thousands an engine, and `ray start` leaves its processes at the shell's limit:
    1,024 on most machines.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
