"""RunChannel: what passes between the driver and the ranks while a run is under way.

Events (progress, log records) go up from the ranks; the wish to stop comes down, and the ranks agree on the place where
they do.  The channel is an actor of its own so that the ranks train on their main threads, undisturbed by calls.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import pickle
import queue
import sys
import threading
from collections.abc import Mapping
from typing import Any

Event = Any
"""A `ProgressUpdate` or a `logging.LogRecord`. Pickled on its way: the channel does not know the classes."""

MAX_EVENTS = 10_000
CALL_TIMEOUT_S = 10.0


class RunChannel:
    """An asynchronous actor; every method may be called by any party at any time.

    Args:
        world_size: number of ranks that have to agree.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._events: list[bytes] = []
        self._places: dict[int, int] = {}
        self._arrived, self._stop, self._agreed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def report(self, events: list[bytes]) -> None:
        """Takes events of a rank. Where the driver does not keep up, the oldest are dropped."""
        self._events = [*self._events, *events][-MAX_EVENTS:]
        self._arrived.set()

    async def drain(self, timeout_s: float) -> list[bytes]:
        """All events since the last call, waiting up to `timeout_s` for the first."""
        await _within(timeout_s, self._arrived)
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    async def request_stop(self) -> None:
        """Called by the driver; idempotent."""
        self._stop.set()

    async def stop_wanted(self, timeout_s: float) -> bool:
        """Whether the ranks shall stop, waiting up to `timeout_s` for it."""
        return await _within(timeout_s, self._stop)

    async def agree(self, rank: int, place: int, timeout_s: float) -> int | None:
        """Where all ranks stop: the furthest place that any of them has reached.

        Args:
            rank: who asks.
            place: where this rank is, see `StopGate`. It does not go on before it has the answer.
            timeout_s: longest wait for the other ranks; then None.
        """
        self._places[rank] = place
        if len(self._places) == self._world_size:
            self._agreed.set()
        return max(self._places.values()) if await _within(timeout_s, self._agreed) else None


async def _within(timeout_s: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def start_channel(world_size: int) -> Any:
    """Handle of a new RunChannel.

    Its process gets the class by value: importing this package there would load torch for nothing.
    """
    import ray
    from ray import cloudpickle

    from rl_lightning.strategies.cluster import beside_me

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        actor: Any = ray.remote(RunChannel).options(max_concurrency=1000, **beside_me())
        return actor.remote(world_size)
    finally:
        cloudpickle.unregister_pickle_by_value(here)


class EventSender:
    """Sends a worker's events in batches from a thread of its own; `put` never blocks.

    Args:
        channel: handle of the RunChannel.
        interval_s: shortest time between two batches.
    """

    def __init__(self, channel: Any, interval_s: float = 0.1) -> None:
        self._channel, self._interval_s = channel, interval_s
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Queues one event."""
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
            except ray.exceptions.GetTimeoutError:
                continue  # a busy machine; they may still arrive
            except ray.exceptions.RayError:  # the driver is gone, and with it whoever would read this
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
