"""StepSignals: Ctrl-C and SIGTERM end a run after a whole step."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from rl_lightning.strategies.stop_signals import EXIT_CODE_OF_SIGTERM

logger = logging.getLogger(__name__)

EXIT_CODE_OF_CTRL_C = 1  # Lightning's for a KeyboardInterrupt


class StepSignals:
    """The signals of one process of a run, from the start of its training until Lightning puts back what it found.

    Lightning ends a run after the step in which SIGTERM came, but also calls Ray's handler, which exits there and then, and in
    several processes it calls a collective from wherever the signal came.  Here the first signal is noted, SIGTERM and Ctrl-C
    alike, and all processes end after the step in which any of them has noted one; the second signal ends the run at once.
    A process that is alone has nobody to agree with, and is ended at once by the first one if there is no step to finish.

    Nothing is changed where Lightning handles no signals: in the ranks of a RayStrategy.

    Args:
        trainer: which is about to train.
        in_step: whether a step is under way.
    """

    def __init__(self, trainer: Trainer, in_step: Callable[[], bool]) -> None:
        self._trainer, self._in_step = trainer, in_step
        self._received: signal.Signals | None = None
        self._before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        self._takes_part = isinstance(self._before[signal.SIGTERM], _HandlersCompose)
        for signum, handler in self._before.items():
            if self._takes_part and callable(handler):  # Ctrl-C may be ignored, as under nohup
                trainer._signal_connector._register_signal(signum, self._note)

    @property
    def exit_code(self) -> int:
        """What a process that was ended ends with. Lightning kills the first one where another one fails: only it says why."""
        if not self._trainer.is_global_zero:
            return 0
        return EXIT_CODE_OF_CTRL_C if self._received == signal.SIGINT else EXIT_CODE_OF_SIGTERM

    def end_step(self) -> None:
        """Has Lightning end the run in all processes if one was told to. A collective."""
        if self._takes_part and self._trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._trainer._signal_connector.received_sigterm = True

    def _note(self, signum: int, frame: FrameType | None) -> None:
        alone = self._trainer.world_size == 1
        if self._received is None and not self._trainer.received_sigterm and (self._in_step() or not alone):
            self._received = signal.Signals(signum)
            self._trainer._signal_connector.received_sigterm = alone
            logger.info("%s: the run ends after this step; a second one ends it at once", self._received.name)
        elif alone or signum == signal.SIGINT:
            self._before[signum](signum, frame)
        else:
            if (launcher := self._trainer.strategy.launcher) is not None:
                launcher.kill(signal.SIGKILL)
            sys.exit(EXIT_CODE_OF_SIGTERM)
