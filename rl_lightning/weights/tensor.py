"""TensorTransport: weights in memory that trainer and server both see, for engines on the trainer's own GPU.

NCCL cannot put two ranks on one GPU.  Here the server opens the trainer's memory instead (CUDA IPC; shared memory on a CPU)
and copies from it, bucket by bucket; a bucket lives until every engine has said that it has it.
"""

from __future__ import annotations

import base64
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, multiprocessing
from torch.multiprocessing import reductions

from rl_lightning.weights.buckets import Bucket, fill_buckets, plan_buckets
from rl_lightning.weights.channel import SyncChannel, SyncFailed, own_address, serve_store
from rl_lightning.weights.fingerprint import FingerprintTaker
from rl_lightning.weights.source import WeightSource, WeightSpec
from rl_lightning.weights.transport import Refusal, WeightTarget, WeightUpdate, in_dtype_of, no_refusal

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BUCKET_BYTES = 512 * 2**20
ALIGNMENT = 16
DEVICE_ARGUMENT = 6
"""Place of the device's index among the arguments of `rebuild_cuda_tensor`."""


class TensorTransport:
    """The trainer's side. `stage` only plans; the weights are read in `send` and must not change in between.

    Args:
        host: address of this machine; by default Ray's node address, or 127.0.0.1 without Ray. Only a few bytes go there.
        bucket_bytes: memory that is shared at a time; twice that much is taken beside the weights.
    """

    name = "tensor"

    def __init__(self, host: str | None = None, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._host, self._bucket_bytes = host, bucket_bytes
        self._store: TCPStore | None = None
        self._counter = itertools.count()
        self._weights: WeightSource | None = None
        self._plan: list[list[WeightSpec]] = []
        self._targets: Sequence[WeightTarget] = ()
        self._channel: SyncChannel | None = None

    def stage(self, version: int, weights: WeightSource, targets: Sequence[WeightTarget]) -> list[WeightUpdate]:
        """The plan; also gives the memory that the training step left in the allocator's cache to the engine beside it."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if self._store is None:
            self._host = self._host or own_address()
            self._store = serve_store(self._host)
        self._weights, self._targets = in_dtype_of(targets, weights), targets
        self._plan = plan_buckets(self._weights.specs(), self._bucket_bytes)
        sync = f"sync{next(self._counter)}"
        self._channel = SyncChannel(self._store, sync)
        payload = {"host": self._host, "port": self._store.port, "sync": sync, "n_buckets": len(self._plan)}
        return [WeightUpdate(version, self.name, {**payload, "engine": i}, None) for i in range(len(targets))]

    def send(self, timeout_s: float, refusal: Refusal = no_refusal) -> None:
        """Shares bucket by bucket as the weights are given, and then tells their fingerprint.

        Raises:
            TimeoutError: an engine did not take a bucket within `timeout_s`, or said that it cannot.
        """
        assert self._channel is not None and self._weights is not None, "stage comes before send"
        deadline = time.monotonic() + timeout_s
        self._channel.refusal = refusal
        buckets = fill_buckets(self._plan, self._weights)
        try:
            self._share(buckets, self._channel, deadline)
        except (SyncFailed, TimeoutError) as error:
            self._channel.fail(f"the trainer gave up: {error}")
            raise TimeoutError(f"weights did not reach every engine: {error}") from error
        finally:
            for _ in buckets:  # other trainer ranks gather along to the end
                pass

    def release(self) -> None:
        """Forgets the tensors, and what was told of them."""
        self._weights = None
        if self._channel is not None:
            self._channel.clear()
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """Ends the store."""
        self.release()
        self._store = self._channel = None

    def _share(self, buckets: Iterator[Bucket], channel: SyncChannel, deadline: float) -> None:
        """While the engines copy one bucket, the next one is gathered."""
        taker = FingerprintTaker([spec for specs in self._plan for spec in specs])
        engines, before = range(len(self._targets)), None
        for i, bucket in enumerate(buckets):
            taker.look(bucket)
            shared = share_bucket(bucket)
            if before is not None:
                channel.watch(_taken(channel, i - 1, engines), deadline, f"engines to copy bucket {i - 1}")
            for engine, target in zip(engines, self._targets, strict=True):
                channel.give_bucket(i, engine, [handles(shared) for _ in range(target.ranks)])
            before = shared  # lives until all have copied it
        channel.watch(_taken(channel, len(self._plan) - 1, engines), deadline, f"engines to copy bucket {len(self._plan) - 1}")
        channel.tell_fingerprint(taker.fingerprint())


def _taken(channel: SyncChannel, bucket: int, engines: range) -> Callable[[], bool]:
    return lambda: channel.is_taken(bucket, engines)


def share_bucket(bucket: Bucket) -> Bucket:
    """The same tensors in one piece of memory, which on a CPU can be opened by its name."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in bucket]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device=bucket[0][1].device)
    if not flat.is_cuda:
        with shared_by_name():
            flat.share_memory_()
    shared = []
    for (name, tensor), place in zip(bucket, flat.split(sizes), strict=True):
        view = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        shared.append((name, view))
    return shared


def handles(bucket: Bucket) -> str:
    """Base64 of the pickled [(name, tensor)] that one process opens, once."""
    buffer = io.BytesIO()
    with shared_by_name():
        ForkingPickler(buffer).dump([(name, _Handle(tensor)) for name, tensor in bucket])
    return base64.b64encode(buffer.getvalue()).decode()


class _Handle:
    """Pickles as a tensor. Its GPU is named by UUID: the same one has another index where other GPUs are visible."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        if self._tensor.is_cuda:
            uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
            arguments = (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])
        return rebuild, arguments


@contextmanager
def shared_by_name() -> Iterator[None]:
    """CPU memory is shared by a name, which any process can open; torch's default hands file descriptors to children."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
