"""The restart checkpoint: everything that a run needs to go on, in one file that is always complete."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rl_lightning.callbacks.frequency import Frequency, ends_epoch, is_due
from rl_lightning.callbacks.step_signals import StepSignals

logger = logging.getLogger(__name__)

NAME = "last.ckpt"


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete restart checkpoint in `folder`, or None.

    `last.ckpt.old` counts where a sharded checkpoint (a folder) was being replaced when the machine went down.
    """
    candidates = (Path(folder) / NAME, Path(folder) / f"{NAME}.old")
    return next((path for path in candidates if path.exists()), None)


class RecoveryCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt`; the previous one is replaced only when the new one is complete.

    Saves between two training steps only: when due, when the trainer was asked to stop, after the last step, and when
    Ctrl-C or SIGTERM comes, see `StepSignals`.  It is a ModelCheckpoint so that Lightning's `ckpt_path="last"` finds its file.

    Args:
        folder: where `last.ckpt` goes.
        epochs: save after every so many epochs; null never.
        steps: save after every so many training steps; null never.
        secs: save when so many seconds passed; null never. With all three null nothing is saved.
    """

    def __init__(
        self, folder: str | os.PathLike[str], epochs: int | None = None, steps: int | None = None, secs: float | None = 600
    ) -> None:
        super().__init__(dirpath=Path(folder), save_last=True, save_top_k=0, enable_version_counter=False)
        self.path, self._part = Path(folder) / NAME, Path(folder) / f"{NAME}.part"
        self.frequency = Frequency(epochs, steps, secs)
        self._saved_step = -1
        self._between_steps = False
        self._signals: StepSignals | None = None

    @property
    def state_key(self) -> str:
        """One restart checkpoint per run."""
        return type(self).__qualname__

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seconds count from the start of training; the state at the start is already on disk or can be made again."""
        self.frequency.restart_clock()
        self._saved_step = trainer.global_step
        self._between_steps = True
        self._signals = StepSignals(trainer, lambda: not self._between_steps)
        if trainer.is_global_zero:
            _remove(self._part)  # of a run that was killed as it saved; a folder of another number of ranks holds other files

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the weights are between two versions."""
        self._between_steps = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves when due, when the run was asked to stop, and after the last step."""
        due = is_due(self.frequency, trainer, batch_idx)
        if self._signals is not None:
            self._signals.end_step()
        if due or trainer.should_stop or trainer.received_sigterm or _is_last_step(trainer, batch_idx):
            self._save(trainer)
        self._between_steps = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves when the epoch ends the run (EarlyStopping); its last batch has been handled."""
        if trainer.should_stop:
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that ends after the step is not validated before."""
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves when the score ends the run (EarlyStopping); else restart checkpoints do not depend on it."""
        if trainer.should_stop and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the last batch has been handled."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves when the run is stopped between two steps; gives the exception that ends it its exit code.

        SIGTERMException comes at the same step in all ranks; KeyboardInterrupt, and the SystemExit that Ray makes of SIGTERM in
        a process that waits for it, may come in one alone, which then could not save without the others.
        """
        together = isinstance(exception, SIGTERMException) or trainer.world_size == 1
        stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))
        under_way = trainer.training or trainer.validating and trainer.state.fn == TrainerFn.FITTING
        if stopped and together and self._between_steps and under_way:
            self._save(trainer)
        if self._signals is not None and isinstance(exception, SIGTERMException):
            exception.code = self._signals.exit_code

    def state_dict(self) -> dict[str, Any]:
        """The counters of the frequency, and where the last checkpoint is."""
        return {**self.frequency.state_dict(), "last_model_path": self.last_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self.frequency.load_state_dict(state_dict)
        self.last_model_path = state_dict["last_model_path"]

    def _save(self, trainer: Trainer) -> None:
        """Collective: every rank must call it at the same step."""
        if not self.frequency.enabled or self._saved_step == trainer.global_step:
            return
        self._saved_step = trainer.global_step
        self.last_model_path = str(self.path)
        trainer.save_checkpoint(self._part, weights_only=False)
        if trainer.is_global_zero:
            _replace(self._part, self.path)
            logger.info("Saved the restart checkpoint of global step %d to %s", trainer.global_step, self.path)
        trainer.strategy.barrier("restart checkpoint")


def _is_last_step(trainer: Trainer, batch_idx: int) -> bool:
    last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return (last_epoch and ends_epoch(trainer, batch_idx)) or 0 < trainer.max_steps <= trainer.global_step


def _replace(part: Path, target: Path) -> None:
    """Moves the complete `part` over `target`; where one is a folder that cannot be done at once, hence `.old` in between.

    An `.old` that is there without `target` is all that there is until then.
    """
    for file in part.iterdir() if part.is_dir() else [part]:
        _flush(file)
    old = target.with_name(f"{NAME}.old")
    if target.is_dir() or (part.is_dir() and target.exists()):
        _remove(old)
        target.rename(old)
    part.replace(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """On disk before it takes the old one's place, so that a power failure leaves one of the two."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
