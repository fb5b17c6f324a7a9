"""SyncChannel: how trainer and engines agree on one collective transfer, and learn at once when the other side cannot go on.

A broadcast waits for ever for a partner that died or never came.  So every transfer is first agreed on through a small
key-value store that the trainer serves, and while data moves either side looks there for the other's failure.

| key | written by | says |
|---|---|---|
| `SYNC/group/ENGINE` | engine | which process group its server is in ("" for none) |
| `SYNC/go` | trainer | the group to use; a server that is in another one joins it now |
| `SYNC/fingerprint` | trainer | all was sent, and this is what an engine must hold now |
| `SYNC/bucket/I/ENGINE` | trainer | where the engine's ranks find bucket I in memory |
| `SYNC/taken/I/ENGINE` | engine | it has copied bucket I |
| `SYNC/failed` | either | why this transfer will not happen |
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from rl_lightning.weights.transport import Fingerprint, Refusal, Sample, no_refusal

if TYPE_CHECKING:
    from torch.distributed import TCPStore

POLL_S = 0.002
REFUSAL_S = 0.1
CONNECT_TIMEOUT_S = 30.0
BACKLOG = 4096  # all ranks or engines of a large run connect at once


class SyncFailed(RuntimeError):
    """The other side gave up; the message is its reason."""


def serve_store(host: str, timeout_s: float = CONNECT_TIMEOUT_S, world_size: int | None = None) -> TCPStore:
    """A store of this process, on a port of `host` that the kernel picks and that is held from the start; IPv4 or IPv6.

    PyTorch by itself would listen at all addresses of the machine.
    """
    from torch.distributed import TCPStore

    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=BACKLOG)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
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


@contextmanager
def served_by_trainer() -> Iterator[None]:
    """Inside, a store that is gone says that its trainer is: it has nobody left to say so."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise SyncFailed(f"the trainer died, or cannot be reached any more: {str(error).splitlines()[0]}") from None


def own_address() -> str:
    """Ray's address of this node, which other nodes reach, or the loopback address where Ray does not run."""
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "127.0.0.1"


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
        self._said: set[str] = set()
        self.refusal: Refusal = no_refusal

    def report_group(self, engine: int, group: str) -> None:
        """Engine: my server is in `group`.

        Raises:
            SyncFailed: the trainer died.
        """
        with served_by_trainer():
            self._store.set(f"{self._sync}/group/{engine}", group)

    def groups(self, engines: range, deadline: float) -> list[str]:
        """Trainer: what the engines reported. Blocks."""
        keys = [f"{self._sync}/group/{engine}" for engine in engines]
        self._said.update(keys)
        self.watch(lambda: self._store.check(keys), deadline, "every engine to be ready for weights")
        return [self._store.get(key).decode() for key in keys]

    def go(self, group: str) -> None:
        """Trainer: all use `group`."""
        self._set("go", group)

    def poll_go(self) -> str | None:
        """Engine: the group to use, or None if that is not yet said. Does not block.

        Raises:
            SyncFailed: the trainer gave up or died.
        """
        return self._poll("go")

    def give_bucket(self, bucket: int, engine: int, handles: Sequence[str]) -> None:
        """Trainer: here is a bucket, one handle for each of the engine's ranks."""
        self._set(f"bucket/{bucket}/{engine}", json.dumps(handles))

    def poll_bucket(self, bucket: int, engine: int) -> list[str] | None:
        """Engine: the handles of a bucket, or None if it is not there yet. Does not block.

        Raises:
            SyncFailed: the trainer gave up or died.
        """
        given = self._poll(f"bucket/{bucket}/{engine}")
        return None if given is None else json.loads(given)

    def report_taken(self, bucket: int, engine: int) -> None:
        """Engine: I have copied it.

        Raises:
            SyncFailed: the trainer died.
        """
        with served_by_trainer():
            self._store.set(f"{self._sync}/taken/{bucket}/{engine}", "")

    def is_taken(self, bucket: int, engines: range) -> bool:
        """Trainer: whether all `engines` have copied it."""
        keys = [f"{self._sync}/taken/{bucket}/{engine}" for engine in engines]
        self._said.update(keys)
        return bool(self._store.check(keys))

    def tell_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Trainer: every weight was sent."""
        self._set("fingerprint", json.dumps(fingerprint))

    def poll_fingerprint(self) -> Fingerprint | None:
        """Engine: what was sent, or None if that is not yet said. Does not block.

        Raises:
            SyncFailed: the trainer gave up or died.
        """
        told = self._poll("fingerprint")
        if told is None:
            return None
        return {name: Sample(tuple(shape), tuple(values)) for name, (shape, values) in json.loads(told).items()}

    def fail(self, reason: str) -> None:
        """Either: this transfer will not happen. A trainer that died is not told."""
        with suppress(SyncFailed), served_by_trainer():
            self._store.set(f"{self._sync}/failed", reason)

    def failure(self) -> str | None:
        """The reason that was given, if any."""
        if time.monotonic() - self._asked_s > REFUSAL_S:
            self._asked_s = time.monotonic()
            if (reason := self.refusal()) is not None:
                return reason
        key = f"{self._sync}/failed"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def expect_more(self) -> None:
        """Engine: looks whether the trainer still goes on. Does not block.

        Raises:
            SyncFailed: the trainer gave up or died.
        """
        with served_by_trainer():
            if (reason := self.failure()) is not None:
                raise SyncFailed(reason)

    def clear(self) -> None:
        """Trainer: nobody will ask any more, save for why it failed. The store would keep all that was ever said otherwise."""
        for key in self._said:
            self._store.delete_key(key)
        self._said.clear()

    def _set(self, key: str, value: str) -> None:
        self._store.set(f"{self._sync}/{key}", value)
        self._said.add(f"{self._sync}/{key}")

    def _poll(self, key: str) -> str | None:
        self.expect_more()
        with served_by_trainer():
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
