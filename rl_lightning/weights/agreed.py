"""AgreedTransport: what transports share whose engines receive while the trainer sends."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rl_lightning.weights.buckets import Bucket, fill_buckets, gathered_to_the_end, plan_buckets
from rl_lightning.weights.cast import in_dtype_of
from rl_lightning.weights.channel import SyncChannel, SyncFailed, own_address, serve_store
from rl_lightning.weights.source import WeightSource, WeightSpec
from rl_lightning.weights.transport import Refusal, WeightTarget, no_refusal

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BUCKET_BYTES = 512 * 2**20


class AgreedTransport(ABC):
    """The trainer's side: both sides agree on every transfer through a `SyncChannel`, in a store that the trainer serves.

    `stage` only plans; the weights are read in `send` and must not change in between.

    Args:
        host: address of this machine that engines can reach; by default Ray's node address, or 127.0.0.1 without Ray.
        bucket_bytes: what moves at a time.
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (SyncFailed, TimeoutError)
    """By what `_move` says that the transfer will not happen."""

    def __init__(self, host: str | None, bucket_bytes: int) -> None:
        self._host, self._bucket_bytes = host, bucket_bytes
        self._store: TCPStore | None = None
        self._counter = itertools.count()
        self._weights: WeightSource | None = None
        self._plan: list[list[WeightSpec]] = []
        self._channel: SyncChannel | None = None

    def send(self, timeout_s: float, refusal: Refusal = no_refusal) -> None:
        """Moves what was staged, bucket by bucket as the weights are given, and then tells their fingerprint.

        Raises:
            TimeoutError: an engine did not take part within `timeout_s`, or said that it cannot.
        """
        assert self._channel is not None and self._weights is not None, "stage comes before send"
        self._channel.refusal = refusal
        with gathered_to_the_end(fill_buckets(self._plan, self._weights)) as buckets:
            try:
                self._move(buckets, self._channel, time.monotonic() + timeout_s)
            except self.failures as error:
                self._channel.fail(f"the trainer gave up: {error}")
                self._give_up()
                raise TimeoutError(f"weights did not reach every engine: {error}") from error

    def release(self) -> None:
        """Forgets the tensors, and what was told of them."""
        self._weights = None
        if self._channel is not None:
            self._channel.clear()

    def close(self) -> None:
        """Ends the store."""
        self.release()
        self._give_up()
        self._store = self._channel = None

    def _agree(self, weights: WeightSource, targets: Sequence[WeightTarget]) -> dict[str, Any]:
        """Plans the transfer and gives it a name; what engines need to find it."""
        if self._store is None:
            self._host = self._host or own_address()
            self._store = serve_store(self._host)
        self._weights = in_dtype_of(targets, weights)
        self._plan = plan_buckets(self._weights.specs(), self._bucket_bytes)
        sync = f"sync{next(self._counter)}"
        self._channel = SyncChannel(self._store, sync)
        return {"host": self._host, "port": self._store.port, "sync": sync}

    @abstractmethod
    def _move(self, buckets: Iterator[Bucket], channel: SyncChannel, deadline: float) -> None:
        """Moves the planned buckets to all engines, until `deadline` of time.monotonic; raises one of `failures`."""

    @abstractmethod
    def _give_up(self) -> None:
        """Lets go of what a transfer leaves for the next one, without waiting for anybody."""
