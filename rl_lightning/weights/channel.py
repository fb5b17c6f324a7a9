"""SyncChannel: how trainer and engines agree on one collective transfer, and learn at once when the other side cannot go on.

A broadcast waits for ever for a partner that died or never came.  So every transfer is first agreed on through a small
key-value store that the trainer serves, and while data moves either side looks there for the other's failure.

| key | written by | says |
|---|---|---|
| `SYNC/group/ENGINE` | engine | which process group its server is in ("" for none) |
| `SYNC/go` | trainer | the group to use; a server that is in another one joins it now |
| `SYNC/fingerprint` | trainer | all was sent, and this is what an engine must hold now |
| `SYNC/failed` | either | why this transfer will not happen |
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from rl_lightning.weights.transport import Fingerprint, Refusal, Sample, no_refusal

if TYPE_CHECKING:
    from torch.distributed import TCPStore

POLL_S = 0.002
REFUSAL_S = 0.1
CONNECT_TIMEOUT_S = 30.0


class SyncFailed(RuntimeError):
    """The other side gave up; the message is its reason."""


def serve_store(host: str) -> TCPStore:
    """A store of this process, on a port of `host` that the kernel picks and that is held from the start."""
    from torch.distributed import TCPStore

    listener = socket.create_server((host, 0), backlog=128)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
        master_listen_fd=listener.detach(),
    )


def connect_store(host: str, port: int) -> TCPStore:
    """The trainer's store, from an engine's process. Blocks for at most 30 s.

    Raises:
        TimeoutError: the trainer cannot be reached.
    """
    from torch.distributed import DistError, TCPStore

    try:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_TIMEOUT_S))
    except DistError as error:
        raise TimeoutError(f"the trainer's store at {host}:{port} was not reached within {CONNECT_TIMEOUT_S:.0f} s") from error


class SyncChannel:
    """One transfer's keys in the store.

    Args:
        store: served by the trainer.
        sync: name of the transfer, never used again.

    Attributes:
        refusal: tells of engines that could not even say here that they will not take part.
    """

    def __init__(self, store: TCPStore, sync: str) -> None:
        self._store = store
        self._sync = sync
        self._asked_s = 0.0
        self.refusal: Refusal = no_refusal

    def report_group(self, engine: int, group: str) -> None:
        """Engine: my server is in `group`."""
        self._store.set(f"{self._sync}/group/{engine}", group)

    def groups(self, engines: range, deadline: float) -> list[str]:
        """Trainer: what the engines reported. Blocks."""
        keys = [f"{self._sync}/group/{engine}" for engine in engines]
        self.watch(lambda: self._store.check(keys), deadline, "every engine to be ready for weights")
        return [self._store.get(key).decode() for key in keys]

    def go(self, group: str) -> None:
        """Trainer: all use `group`."""
        self._store.set(f"{self._sync}/go", group)

    def poll_go(self) -> str | None:
        """Engine: the group to use, or None if that is not yet said. Does not block.

        Raises:
            SyncFailed: the trainer gave up.
        """
        return self._poll("go")

    def tell_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Trainer: every weight was sent."""
        self._store.set(f"{self._sync}/fingerprint", json.dumps(fingerprint))

    def poll_fingerprint(self) -> Fingerprint | None:
        """Engine: what was sent, or None if that is not yet said. Does not block.

        Raises:
            SyncFailed: the trainer gave up.
        """
        told = self._poll("fingerprint")
        if told is None:
            return None
        return {name: Sample(tuple(shape), tuple(values)) for name, (shape, values) in json.loads(told).items()}

    def fail(self, reason: str) -> None:
        """Either: this transfer will not happen."""
        self._store.set(f"{self._sync}/failed", reason)

    def failure(self) -> str | None:
        """The reason that was given, if any."""
        if time.monotonic() - self._asked_s > REFUSAL_S:
            self._asked_s = time.monotonic()
            if (reason := self.refusal()) is not None:
                return reason
        key = f"{self._sync}/failed"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _poll(self, key: str) -> str | None:
        if (reason := self.failure()) is not None:
            raise SyncFailed(reason)
        key = f"{self._sync}/{key}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def watch(self, done: Callable[[], bool], deadline: float, what: str) -> None:
        """Waits until `done`. Blocks.

        Raises:
            SyncFailed: the other side gave up.
            TimeoutError: `deadline` (of time.monotonic) passed; says that it waited for `what`.
        """
        started = time.monotonic()
        while not done():
            if (reason := self.failure()) is not None:
                raise SyncFailed(reason)
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {time.monotonic() - started:.0f} s for {what}")
            time.sleep(POLL_S)
