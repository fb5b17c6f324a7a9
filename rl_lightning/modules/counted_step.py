"""counted_once: many updates, or none, as one step of the Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer


@contextmanager
def counted_once(optimizers: Sequence[LightningOptimizer], schedulers: Sequence[Any]) -> Iterator[None]:
    """Lightning counts a global step for every step of an optimiser; those taken inside are counted as one, at the end.

    Args:
        optimizers: that may step inside; the first one's counter is used.
        schedulers: of learning rates, stepped once afterwards; None entries are passed over.
    """
    hooks = [(optimizer, optimizer._on_before_step, optimizer._on_after_step) for optimizer in optimizers]
    for optimizer, _, _ in hooks:
        optimizer._on_before_step = optimizer._on_after_step = lambda: None
    try:
        yield
    finally:
        for optimizer, before, after in hooks:
            optimizer._on_before_step, optimizer._on_after_step = before, after
    _, count_start, count_end = hooks[0]
    count_start()
    count_end()
    for scheduler in schedulers:
        if scheduler is not None:
            scheduler.step()
