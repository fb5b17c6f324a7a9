"""One line and the statistics for every training step, in `main.log` and on the terminal."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rl_lightning.callbacks.main_log import MainLog

logger = logging.getLogger(__name__)

COLUMNS = 4


class RunLog(Callback):
    """Writes `Epoch 1/5 step 6/19 (global step 6) finishes.` with times, then the module's `step_statistics`.

    Everything goes through Python's logging: rank 0 writes `main.log` in `folder`, and whatever shows this process's
    log records shows the lines on the terminal.

    Args:
        folder: the run's log folder.
        clock: seconds on a clock that only moves forward.
    """

    def __init__(self, folder: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = os.fspath(folder)
        self._clock = clock
        self._file: MainLog | None = None
        self._started_s = self._last_s = clock()
        self._first_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens `main.log` on rank 0."""
        if trainer.is_global_zero:
            self._file = MainLog.attach(self.folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes `main.log`."""
        if self._file is not None:
            self._file.detach()
            self._file = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Times count from here."""
        self._started_s = self._last_s = self._clock()
        self._first_step = trainer.global_step
        if trainer.is_global_zero and trainer.global_step > 0:
            logger.info("Training goes on after global step %d", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step's line and statistics."""
        if not trainer.is_global_zero:
            return
        now = self._clock()
        line = self._step_line(trainer, batch_idx, now)
        self._last_s = now
        # engines get this step's weights after it: here stand the times of those that it started from
        statistics = {**getattr(pl_module, "weight_times", {}), **getattr(pl_module, "step_statistics", {})}
        logger.info("%s%s", line, format_statistics(statistics))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What validation measured: every metric whose name starts with `val`."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        if trainer.is_global_zero and metrics:
            alone = trainer.state.fn != TrainerFn.FITTING  # Lightning counts no steps then, whatever the checkpoint's are
            what = f"of {trainer.ckpt_path or 'the model'}" if alone else f"after global step {trainer.global_step}"
            logger.info("Validation %s%s", what, format_statistics(metrics))

    def _step_line(self, trainer: Trainer, batch_idx: int, now: float) -> str:
        step_s, total_s = now - self._last_s, now - self._started_s
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs not in (None, -1) else ""
        steps = trainer.num_training_batches
        of_steps = "" if steps == float("inf") else f"/{int(steps)}"
        place = f"Epoch {trainer.current_epoch + 1}{epochs} step {batch_idx + 1}{of_steps} (global step {trainer.global_step})"
        line = f"{place} finishes. This step {format_duration(step_s)}, total {format_duration(total_s)}"
        left = steps_left(trainer)
        if left is None:
            return f"{line}."
        mean_s = total_s / max(1, trainer.global_step - self._first_step)
        return f"{line}, about {format_duration(left * mean_s)} remaining."


def steps_left(trainer: Trainer) -> int | None:
    """Training steps until the run ends by `max_epochs` or `max_steps`; None if neither is set."""
    ends = []
    if trainer.max_epochs not in (None, -1) and trainer.num_training_batches != float("inf"):
        ends.append(int(trainer.max_epochs * trainer.num_training_batches))
    if trainer.max_steps > 0:
        ends.append(trainer.max_steps)
    return max(0, min(ends) - trainer.global_step) if ends else None


def format_duration(seconds: float) -> str:
    """`8.3 s`, `4 min 05 s`, `3 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_statistics(statistics: Mapping[str, float]) -> str:
    """Names and values in aligned columns, each row on a new line; empty for no statistics."""
    cells = [f"{name} {value:.4g}" for name, value in sorted(statistics.items())]
    widths = [max(map(len, cells[column::COLUMNS]), default=0) for column in range(COLUMNS)]
    rows = [zip(cells[i : i + COLUMNS], widths, strict=False) for i in range(0, len(cells), COLUMNS)]
    return "".join("\n    " + "  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in rows)
