"""StopSignals: Ctrl-C and SIGTERM at the driver of a run."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

EXIT_CODE_OF_SIGTERM = 128 + signal.SIGTERM


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them, while a run is under way in the main thread.

    Attributes:
        received: the last signal, None while there was none.
        count: how many there were; the second one means at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def install(self) -> None:
        """Takes the signals. To be called again after `ray.init`, which has native code abort on SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(signum, self._note)
                self._previous.setdefault(signum, previous)

    def exception(self) -> BaseException:
        """What Lightning expects of the signal: KeyboardInterrupt, or SIGTERMException with the usual exit code."""
        return SIGTERMException(EXIT_CODE_OF_SIGTERM) if self.received == signal.SIGTERM else KeyboardInterrupt()

    def check(self) -> None:
        """Raises that exception if there was a signal; for places where nothing has to be finished first."""
        if self.received is not None:
            raise self.exception()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received, self.count = signal.Signals(signum), self.count + 1
