"""When something is due: after so many epochs, steps or seconds, whichever comes first."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def ends_epoch(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch is the epoch's last. Lightning's `is_last_batch` does not know it in an epoch that was resumed."""
    return trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches


def is_due(frequency: Frequency, trainer: Trainer, batch_idx: int) -> bool:
    """Counts a finished step; whether anything is due, in all ranks the same. Every rank must call it."""
    due = frequency.step(ends_epoch=ends_epoch(trainer, batch_idx))
    # clocks of the ranks differ
    return due if frequency.secs is None else bool(trainer.strategy.broadcast(due))


class Frequency:
    """Three independent counters. Each starts again when it was due itself, not when another one was.

    Args:
        epochs: due after every so many finished epochs; null never.
        steps: due after every so many finished training steps; null never.
        secs: due when so many seconds passed since it was due last; null never.
        clock: seconds on a clock that only moves forward.

    Raises:
        ValueError: a value is not positive.
    """

    def __init__(
        self,
        epochs: int | None = None,
        steps: int | None = None,
        secs: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("epochs", epochs), ("steps", steps), ("secs", secs)):
            if value is not None and value <= 0:
                raise ValueError(
                    f"a frequency of {name}={value} is not possible: give a positive number, or null to switch it off"
                )
        self.epochs, self.steps, self.secs = epochs, steps, secs
        self._clock = clock
        self._n_epochs = 0
        self._n_steps = 0
        self._since = clock()

    @property
    def enabled(self) -> bool:
        """Whether it can ever be due."""
        return not (self.epochs is None and self.steps is None and self.secs is None)

    def restart_clock(self) -> None:
        """Seconds count from now, so that start-up and loading do not count."""
        self._since = self._clock()

    def step(self, *, ends_epoch: bool = False) -> bool:
        """Counts one finished training step, and the epoch that it ends, and returns whether anything is due."""
        self._n_steps += 1
        self._n_epochs += ends_epoch
        due_steps = self.steps is not None and self._n_steps >= self.steps
        due_epochs = self.epochs is not None and self._n_epochs >= self.epochs
        due_secs = self.secs is not None and self._clock() - self._since >= self.secs
        if due_steps:
            self._n_steps = 0
        if due_epochs:
            self._n_epochs = 0
        if due_secs:
            self._since = self._clock()
        return due_steps or due_epochs or due_secs

    def state_dict(self) -> dict[str, Any]:
        """What was counted; seconds start again after a restart."""
        return {"epochs": self._n_epochs, "steps": self._n_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting from `state`."""
        self._n_epochs, self._n_steps = state["epochs"], state["steps"]
