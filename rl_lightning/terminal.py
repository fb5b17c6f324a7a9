"""Log records on the terminal: short lines that do not tear a progress bar."""

from __future__ import annotations

import logging

PACKAGE = "rl_lightning"


class Terminal(logging.Handler):
    """Shows `12:03:44 message` on standard error, above a progress bar if there is one.

    A record with a true `brief` attribute is shown without its traceback, which then stands in `main.log` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))

    def format(self, record: logging.LogRecord) -> str:
        """The line, with its level where that is worth a look."""
        shown = logging.makeLogRecord(record.__dict__)
        if getattr(record, "brief", False):
            shown.exc_info = shown.exc_text = None
        if record.levelno >= logging.WARNING:
            shown.msg, shown.args = f"{record.levelname.lower()}: {record.getMessage()}", ()
        return super().format(shown)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes through tqdm, which knows its bars."""
        import sys

        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def show_logs() -> None:
    """Shows this package's records from INFO on, unless the program that we are part of has set up logging. Idempotent."""
    log = logging.getLogger(PACKAGE)
    if log.getEffectiveLevel() > logging.INFO or log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(Terminal())
