"""StopGate: where the ranks of a run end it, between two batches and all at the same one."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)

POLL_S = 0.02
AGREEMENT_TIMEOUT_S = 10.0

_collection = threading.Lock()


class StopGate(Callback):
    """Ends training in one rank at the place that all ranks agreed on.

    Places are numbered in the order in which a rank passes them: `2n` is inside batch n (counted from 1), `2n + 1` between
    batches n and n + 1.  The ranks end at the furthest place that any of them has reached when the stop is asked for,
    because Lightning and the user's hooks have collective operations on the way from one to the next.
    At `2n` Lightning is told to end after the batch; at `2n + 1` the rank ends while it waits for data, or else before
    batch n + 1 begins.  Until the first batch there is nothing to lose, and a rank ends wherever it is.

    In all cases Lightning's SIGTERMException is raised, so that callbacks save as they do for a single process.

    Args:
        agree: takes this rank's place and gives the furthest of all ranks; None if they do not all answer.
    """

    def __init__(self, agree: Callable[[int], int | None]) -> None:
        self._agree = agree
        self._place = 1
        self._end: int | None = None
        self._requested, self._decided = threading.Event(), threading.Event()
        self._raised = False
        self._lock = threading.Lock()

    @property
    def raised(self) -> bool:
        """Whether the run was ended here."""
        return self._raised

    # -- main thread

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Holds back a batch that comes after the agreed place."""
        end = self._pass()
        if end is not None and end < self._place:
            self._raise()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """If it was this batch, has Lightning end the run once its counters of it are complete."""
        end = self._pass()
        if end is not None and end < self._place:
            self._raised = True
            trainer._signal_connector.received_sigterm = True

    def _pass(self) -> int | None:
        """Goes to the next place; gives the agreed one, None while nobody asks for a stop."""
        self._place += 1  # before looking at the request: `request` does the two in the other order
        if self._requested.is_set():
            self._decided.wait(AGREEMENT_TIMEOUT_S)
        return self._end

    def _raise(self) -> None:
        with self._lock:
            if self._raised:
                return  # the interruption is on its way
            self._raised = True
        raise SIGTERMException

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        raise SIGTERMException

    # -- any thread

    def request(self) -> None:
        """Makes this rank stop; returns when it will.  Called once, not from the main thread."""
        self._requested.set()
        self._end = self._agree(self._place)
        self._decided.set()
        if self._end is None:
            logger.warning("the ranks did not agree on where to stop within %.0f s", AGREEMENT_TIMEOUT_S)
            return
        while not self._interrupt_if_waiting():
            time.sleep(POLL_S)

    def _interrupt_if_waiting(self) -> bool:
        with self._lock:
            if self._raised:
                return True
            if self._end != self._place or (self._place > 1 and not _waits_for_data()):
                return False
            self._raised = True
            signal.pthread_kill(_main_thread_id(), signal.SIGUSR2)
            return True

    def install(self, trainer: Trainer) -> None:
        """Takes SIGUSR2, by which it ends a wait for data, and keeps Lightning from handling signals.

        Called in the main thread, before training.
        """
        signal.signal(signal.SIGUSR2, self._on_interrupt)
        trainer._signal_connector = QuietSignals(trainer)


class QuietSignals(_SignalConnector):
    """For trainers in workers: signals are the driver's business, and Lightning's SIGTERM handler calls a collective."""

    def register_signal_handlers(self) -> None:
        """Registers none."""


def _main_thread_id() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def main_frame() -> FrameType | None:
    """Where the main thread is.

    Python holds its list of threads meanwhile. Garbage collected then, a tensor for example, may let another thread run that
    wants the list too, and neither goes on (python/cpython#106883).
    """
    with _collection:
        is_enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(_main_thread_id())
        finally:
            if is_enabled:
                gc.enable()


def _waits_for_data() -> bool:
    """Whether the main thread is fetching a batch: no step is half done then, and no file half written."""
    frame = main_frame()
    while frame is not None:
        if frame.f_code is _DataFetcher.__next__.__code__:
            return True
        frame = frame.f_back
    return False
