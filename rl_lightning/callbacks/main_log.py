"""`main.log`: what the run says about itself, one line an event, in the run's folder."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

SOURCES = ("rl_lightning", "lightning.pytorch")
"""Loggers whose records belong to the run."""


class MainLog(logging.FileHandler):
    """Appends this process's own records to `folder/main.log`.

    The driver and rank 0 each write their own; records that one process passes on to another are written once, where
    they arose.

    Args:
        folder: the run's log folder; created if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        super().__init__(Path(folder) / "main.log", mode="a", encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._owner = os.getpid()
        self._is_broken = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record of this process."""
        if record.process == self._owner:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Says once that the file cannot be written, a full disk most often, instead of a traceback for every record."""
        if not self._is_broken:
            self._is_broken = True  # first: the warning comes here, too
            logging.getLogger(SOURCES[0]).warning("%s cannot be written (%s)", self.baseFilename, sys.exception())

    def close(self) -> None:
        """Closes the file; what a full disk did not take of it is lost."""
        with contextlib.suppress(OSError):
            super().close()

    @classmethod
    def attach(cls, folder: str | os.PathLike[str]) -> MainLog | None:
        """Starts writing; None if this process writes that file already."""
        path = os.path.abspath(Path(folder) / "main.log")
        root = logging.getLogger(SOURCES[0])
        if any(isinstance(handler, cls) and handler.baseFilename == path for handler in root.handlers):
            return None
        handler = cls(folder)
        for name in SOURCES:
            logging.getLogger(name).addHandler(handler)
        if root.getEffectiveLevel() > logging.INFO:
            root.setLevel(logging.INFO)
        return handler

    def detach(self) -> None:
        """Stops writing and closes the file."""
        for name in SOURCES:
            logging.getLogger(name).removeHandler(self)
        self.close()

    @classmethod
    def detach_all(cls) -> None:
        """Stops writing every file of this process."""
        for handler in list(logging.getLogger(SOURCES[0]).handlers):
            if isinstance(handler, cls):
                handler.detach()
