"""Progress bars across processes: rank 0 reports where it is, the driver draws it on its terminal."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from rl_lightning.strategies.events import EventSender

logger = logging.getLogger(__name__)

REPORT_S = 0.1
LINE_S = 30.0


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """Where rank 0 is.

    Attributes:
        title: what runs, e.g. `Epoch 1/5` or `Validation`.
        batch: finished batches.
        total: batches of this epoch or evaluation, None where that is unknown.
        metrics: what the bar shows beside it, e.g. reward and staleness.
    """

    title: str
    batch: int
    total: int | None
    metrics: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether this is the last batch."""
        return self.batch == self.total


class ProgressForwarder(Callback):
    """Takes the place of the trainer's progress bars in rank 0 and shows the same metrics.

    Args:
        bars: the callbacks that it replaces; the first one's `get_metrics` says what is shown.
        sender: carries the updates to the driver.
    """

    def __init__(self, bars: list[ProgressBar], sender: EventSender) -> None:
        self._bars, self._sender = bars, sender
        self._sent_at = -math.inf

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Reports the training batch."""
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        title = f"Epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs else "")
        self._report(trainer, pl_module, title, batch_idx + 1, trainer.num_training_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Reports the validation batch."""
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        title = "Sanity check" if trainer.sanity_checking else "Validation"
        self._report(trainer, pl_module, title, batch_idx + 1, _of(counts, dataloader_idx))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Reports the test batch."""
        self._report(trainer, pl_module, "Test", batch_idx + 1, _of(trainer.num_test_batches, dataloader_idx))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Reports the predicted batch."""
        self._report(trainer, pl_module, "Prediction", batch_idx + 1, _of(trainer.num_predict_batches, dataloader_idx))

    def _report(self, trainer: Trainer, pl_module: LightningModule, title: str, batch: int, total: float) -> None:
        now, known = time.monotonic(), int(total) if math.isfinite(total) else None
        if now - self._sent_at < REPORT_S and batch != known:
            return  # reading metrics waits for the device
        self._sent_at = now
        metrics = {} if trainer.sanity_checking else self._bars[0].get_metrics(trainer, pl_module)
        self._sender.put(ProgressUpdate(title, batch, known, {name: _shown(value) for name, value in metrics.items()}))


class ProgressView:
    """The driver's side: a bar on a terminal, a log line every `LINE_S` elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._title = ""
        self._line_at = time.monotonic()

    def show(self, update: ProgressUpdate) -> None:
        """Draws the update."""
        if not sys.stderr.isatty():
            self._log(update)
            return
        if self._bar is None or self._title != update.title:
            self.close()
            size = shutil.get_terminal_size()  # tqdm itself draws nothing on a terminal that does not know its size
            self._title = update.title
            self._bar = tqdm(total=update.total, desc=update.title, ncols=size.columns, nrows=size.lines)
        self._bar.set_postfix(update.metrics, refresh=False)
        self._bar.update(update.batch - self._bar.n)
        if update.complete:
            self.close()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Out of the way while something else writes to the terminal."""
        if self._bar is None:
            yield
            return
        with tqdm.external_write_mode(sys.stderr):
            yield

    def close(self) -> None:
        """Leaves the bar as it is and goes to the next line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log(self, update: ProgressUpdate) -> None:
        now = time.monotonic()
        if now - self._line_at < LINE_S:
            return
        self._line_at = now
        metrics = " ".join(f"{name}={value}" for name, value in update.metrics.items())
        logger.info("%s %d/%s %s", update.title, update.batch, update.total or "?", metrics)


def replace_bars(trainer: Trainer, sender: EventSender) -> None:
    """Removes the trainer's progress bars in every rank, and forwards from rank 0 what they would have shown."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    callbacks[:] = [callback for callback in callbacks if callback not in bars]
    if bars and trainer.is_global_zero:
        callbacks.append(ProgressForwarder(bars, sender))


def _of(counts: list[int | float], index: int) -> float:
    return counts[index] if index < len(counts) else math.inf


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
