"""EventSender: progress and log records on their way from a rank to the driver."""

from __future__ import annotations

import logging
import logging.handlers
import pickle
import queue
import sys
import threading
from collections.abc import Mapping
from typing import Any

from rl_lightning.strategies.channel import CALL_TIMEOUT_S

Event = Any
"""A `ProgressUpdate` or a `logging.LogRecord`."""


class EventSender:
    """Sends a worker's events in batches from a thread of its own; `put` never blocks.

    Args:
        channel: handle of the RunChannel.
        interval_s: shortest time between two batches.
    """

    def __init__(self, channel: Any, interval_s: float = 0.1) -> None:
        self._channel, self._interval_s = channel, interval_s
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._closing, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Queues one event, unless nobody is left to read it."""
        if not self._over:
            self._queue.put(event)

    def close(self) -> None:
        """Sends what is left; returns when it has arrived, or after `CALL_TIMEOUT_S`."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(CALL_TIMEOUT_S)

    def _run(self) -> None:
        import ray

        open_ = True
        while open_:
            batch = [self._queue.get()]
            self._closing.wait(self._interval_s)
            while not self._queue.empty():
                batch.append(self._queue.get())
            open_ = None not in batch
            events = [pickle.dumps(event) for event in batch if event is not None]
            try:
                ray.get(self._channel.report.remote(events), timeout=CALL_TIMEOUT_S)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                continue  # a busy machine, or a network that is cut for a moment; they may still arrive
            except ray.exceptions.RayError:  # the driver is gone, and with it whoever would read this
                self._over = True
                return


class EventHandler(logging.handlers.QueueHandler):
    """A logging handler that sends records to the driver, which handles them by its own configuration.

    Args:
        sender: of this worker.
        rank: records of ranks above 0 are marked with it.
    """

    def __init__(self, sender: EventSender, rank: int) -> None:
        super().__init__(queue.SimpleQueue())  # not used: `enqueue` below
        self._sender, self._rank = sender, rank

    def emit(self, record: logging.LogRecord) -> None:
        """Sends the record, except Ray's own (sending makes some) and a warning that rank 0 gives as well."""
        repeated = self._rank > 0 and record.name == "py.warnings"
        if record.name.partition(".")[0] != "ray" and not repeated:
            super().emit(record)

    def prepare(self, record: logging.LogRecord) -> Any:
        """As text only, since arguments need not pickle."""
        record = super().prepare(record)
        if self._rank:
            record.msg = record.message = f"[rank {self._rank}] {record.msg}"
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """To the sender."""
        self._sender.put(record)


def log_levels() -> dict[str, int]:
    """Levels set in this process by logger name; the root logger's name is empty."""
    loggers = {name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    return {"": logging.root.level, **{name: logger.level for name, logger in loggers.items() if logger.level}}


def forward_logging(sender: EventSender, rank: int, levels: Mapping[str, int]) -> None:
    """Sends this worker's log records and warnings to the driver instead of its terminal, at the driver's levels.

    Records that go to files go there as before.
    """
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)
    known = [logging.root, *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    for logger in known:
        if logger.name.partition(".")[0] == "ray":
            continue
        terminal = [handler for handler in logger.handlers if getattr(handler, "stream", None) in (sys.stdout, sys.stderr)]
        for handler in terminal:
            logger.removeHandler(handler)
        if terminal:
            logger.propagate = True
    logging.root.addHandler(EventHandler(sender, rank))
    logging.captureWarnings(True)
